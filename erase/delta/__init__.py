"""Deltas: the exact, reversible change of the weights by an erasure, in one file that says how it was made."""

from erase.delta.change import Delta as Delta
from erase.delta.change import State as State
from erase.delta.change import apply as apply
from erase.delta.change import changed_bits as changed_bits
from erase.delta.change import difference as difference
from erase.delta.change import layout_of as layout_of
from erase.delta.change import load as load
from erase.delta.change import remove as remove
from erase.delta.change import require_layout as require_layout
from erase.delta.change import save as save
from erase.delta.change import summary as summary
from erase.delta.header import Header as Header
from erase.delta.header import Layout as Layout
from erase.delta.names import Component as Component
from erase.delta.names import in_component as in_component
from erase.delta.names import of_component as of_component
from erase.tensor_files import content_hash as content_hash
