"""Held-out losses example by example, at a cost that is known before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_nb.blocks import IGNORE, Block, batches
from lora_nb.errors import RankError
from lora_nb.rank.choice import Losses
from lora_nb.training.loss import predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST = 8  # examples; of fewer a standard error says nothing
SHORTEST = 16  # tokens of a text that is cut so that this many examples cost no more than they may
BATCH = 16


def of_blocks(model: nn.Module, tokenizer: PreTrainedTokenizerBase, blocks: Sequence[Block], tokens: float) -> Callable[[], Losses]:
    """A function that gives the losses of the model as it then is, on blocks of about `tokens` tokens, taken from all over the data.

    Where that is less than the fewest blocks have, running text is cut to its first tokens.

    Raises:
        RankError: too few blocks.
    """
    labelled = [b for b in blocks if any(label != IGNORE for label in b.labels[1:])]
    wanted = max(FEWEST, int(tokens / max(1.0, sum(len(b.input_ids) for b in labelled) / max(1, len(labelled)))))
    if len(labelled) < FEWEST:
        raise RankError(
            f"There are {len(labelled)} held-out blocks; ranks are told apart by at least {FEWEST}: give more, or a shorter seq_len."
        )
    chosen = [
        _cut(labelled[i], max(SHORTEST, int(tokens / wanted))) if wanted == FEWEST else labelled[i]
        for i in _spread_out(len(labelled), wanted)
    ]
    # Rows of like length together: less padding.
    order = sorted(range(len(chosen)), key=lambda i: len(chosen[i].input_ids))
    rows = list(batches(chosen, BATCH, int(tokenizer.pad_token_id or 0), order))
    device = next(model.parameters()).device

    def losses() -> Losses:
        parts = [_sums(model, ids.to(device), labels) for ids, labels in rows]
        return _finite(Losses(torch.cat([sums for sums, _ in parts]), torch.cat([tokens for _, tokens in parts])))

    return losses


def of_function(model: nn.Module, losses: Callable[[nn.Module], Tensor]) -> Callable[[], Losses]:
    """The same from one's own function, model → the loss of each example (n,).

    Raises:
        RankError: it gives something else, or too few examples.
    """

    def checked() -> Losses:
        found = losses(model)
        if not isinstance(found, Tensor) or found.ndim != 1 or len(found) < FEWEST:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise RankError(f"losses(model) gave {what}: it must give the loss of each of at least {FEWEST} examples, (n,).")
        return _finite(Losses(found.detach().double().cpu(), torch.ones(len(found))))

    return checked


def _finite(losses: Losses) -> Losses:
    if not losses.sums.isfinite().all():
        raise RankError("A held-out loss is NaN or infinite, with which no rank can be compared: look at the data and at the run's losses.")
    return losses


def _sums(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and number of labelled tokens of each row, (batch,)."""
    losses, _, _ = predictions(model, ids, labels)
    row = (labels[:, 1:] != IGNORE).nonzero()[:, 0]
    zeros = torch.zeros(len(labels), dtype=torch.float64)
    return zeros.index_add(0, row, losses.double().cpu()), zeros.index_add(0, row, torch.ones(len(row), dtype=torch.float64))


def _cut(block: Block, most: int) -> Block:
    """Its first tokens, unless some of them have no label: an answer comes last."""
    if IGNORE in block.labels[1:most]:
        return block
    return Block(block.input_ids[:most], block.labels[:most], block.positions[:most])


def _spread_out(count: int, wanted: int) -> Sequence[int]:
    """`wanted` of `count` places, evenly."""
    return range(count) if wanted >= count else [int(i * count / wanted) for i in range(wanted)]
