"""Which single weights may change: scores, selection and storage of masks."""

from erase.masks.header import Header as Header
from erase.masks.score import Saliency as Saliency
from erase.masks.score import Score as Score
from erase.masks.selection import kth_largest as kth_largest
from erase.masks.selection import random_mask as random_mask
from erase.masks.selection import select as select
from erase.masks.selection import select_packed as select_packed
from erase.masks.selection import threshold as threshold
from erase.masks.store import Mask as Mask
from erase.masks.store import Packed as Packed
from erase.masks.store import check as check
from erase.masks.store import count as count
from erase.masks.store import fraction_by_block as fraction_by_block
from erase.masks.store import iou as iou
from erase.masks.store import load as load
from erase.masks.store import load_reference as load_reference
from erase.masks.store import pack as pack
from erase.masks.store import save as save
from erase.masks.store import save_reference as save_reference
from erase.masks.store import union as union
