"""Which rank does a task need? From one training run at a high rank, without a run for each.

1. Take each module's update apart into directions, the weightiest first (`directions.py`).
2. Cut all modules to the same rank, and score that on held-out data; do so for a few ranks (`choice.py`).
3. The smallest rank that is as good as the best is the answer; how it varies with the held-out examples is its interval.
4. Let the directions of all modules compete for fewer parameters as long as the held-out loss stays (`budget.py`).

A rank above what the data can tell from noise makes the held-out loss higher, so the noise is cut off by the same rule. What an
energy threshold on singular values cannot know is where the noise begins.

The interval is of the held-out examples alone: another seed of the training can move the answer as well.
"""

from lora_nb.rank.find import find_rank
from lora_nb.rank.report import RankReport, shrink

__all__ = ["RankReport", "find_rank", "shrink"]
