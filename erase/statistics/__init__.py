"""Figures with honest intervals: rates, means, paired differences, and the same over several erasure runs.

Images of one prompt resemble each other, so intervals are over prompts wherever a prompt has several images: `n` is
divided by a design effect, whose intraclass correlation is never taken to be below `MIN_ICC`. Every p-value is the
level at which its interval touches 0, so p < .05 if and only if the printed 95 % interval excludes 0. Where nothing
can be told, `low` and `high` are None.

    one model      rate, mean                  several runs      pooled
    two models     paired_rate, paired_mean    several runs      paired_pooled
    a ratio        ratio                       many tests        holm

Formulas, coverage and references: docs/evaluation.md.
"""

from erase.statistics.clusters import MIN_ICC as MIN_ICC
from erase.statistics.figures import CONFIDENCE as CONFIDENCE
from erase.statistics.figures import ONE_PROMPT as ONE_PROMPT
from erase.statistics.figures import Comparison as Comparison
from erase.statistics.figures import Score as Score
from erase.statistics.figures import to_json as to_json
from erase.statistics.holm import holm as holm
from erase.statistics.means import FEW_VALUES as FEW_VALUES
from erase.statistics.means import mean as mean
from erase.statistics.means import paired_mean as paired_mean
from erase.statistics.pairs import paired_rate as paired_rate
from erase.statistics.pooled import paired_pooled as paired_pooled
from erase.statistics.pooled import pooled as pooled
from erase.statistics.rates import rate as rate
from erase.statistics.ratio import prompts_to_show_erased as prompts_to_show_erased
from erase.statistics.ratio import prompts_to_show_kept as prompts_to_show_kept
from erase.statistics.ratio import ratio as ratio
