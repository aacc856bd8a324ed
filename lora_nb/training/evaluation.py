"""How well a model predicts data that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_nb.blocks import IGNORE, Block, batches
from lora_nb.datasets import Dataset
from lora_nb.errors import DatasetError
from lora_nb.render import html_table, text_table
from lora_nb.training.loss import predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """Held-out quality.

    `loss` is nats a token, `perplexity` its exponential, `bits_per_byte` the same per UTF-8 byte of the predicted text (which
    compares across tokenizers), `token_accuracy` the share of tokens that come first, `exact_match` the share of examples
    with every token first: for pairs, what greedy decoding would get entirely right. `tokens` and `examples` were counted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    token_accuracy: float
    exact_match: float
    tokens: int
    examples: int

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("loss (nats a token)", f"{self.loss:.4f}"),
            ("perplexity", f"{self.perplexity:.2f}"),
            ("bits per byte", f"{self.bits_per_byte:.3f}"),
            ("tokens right", f"{100 * self.token_accuracy:.1f} %"),
            ("examples all right", f"{100 * self.exact_match:.1f} %"),
            ("tokens counted", f"{self.tokens:,}"),
        ]

    def __repr__(self) -> str:
        return text_table(["held-out", ""], self._rows())

    def _repr_html_(self) -> str:
        return html_table(["held-out", ""], self._rows())


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    seq_len: int = 256,
    batch_size: int = 16,
    max_blocks: int | None = None,
) -> Evaluation:
    """Loss and accuracy on `dataset`, of the model as it stands; its training mode is put back afterwards.

    Args:
        seq_len: tokens in a block of text; more context predicts better, so compare at the same length.
        max_blocks: count only the first so many blocks.

    Raises:
        DatasetError: nothing to count.
    """
    return evaluate_blocks(model, tokenizer, dataset.encode(tokenizer, seq_len)[:max_blocks], batch_size=batch_size)


@torch.no_grad()
def evaluate_blocks(model: nn.Module, tokenizer: PreTrainedTokenizerBase, blocks: list[Block], *, batch_size: int = 16) -> Evaluation:
    """`evaluate` on data that is tokens already."""
    from tqdm.auto import tqdm

    device, training = next(model.parameters()).device, model.training
    # Rows of like length together: less padding. The sums do not depend on the order.
    order = sorted(range(len(blocks)), key=lambda i: len(blocks[i].input_ids))
    nats, right, exact, tokens = 0.0, 0, 0, 0
    model.eval()
    try:
        rows = batches(blocks, batch_size, int(tokenizer.pad_token_id or 0), order)
        for ids, labels in tqdm(rows, total=math.ceil(len(blocks) / batch_size), desc="evaluating", delay=2, leave=False):
            losses, guesses, goals = predictions(model, ids.to(device), labels)
            hits = guesses == goals
            row = (labels[:, 1:] != IGNORE).nonzero()[:, 0].to(device)
            wrong = torch.zeros(len(ids), device=device).index_add_(0, row, (~hits).float())
            nats += float(losses.double().sum())
            right, exact, tokens = right + int(hits.sum()), exact + int((wrong == 0).sum()), tokens + len(goals)
    finally:
        model.train(training)
    if not tokens:
        raise DatasetError("There is not one token to predict in this data.")
    loss, size = nats / tokens, _bytes(tokenizer, blocks)
    return Evaluation(loss, math.exp(min(loss, 700.0)), nats / math.log(2) / size, right / tokens, exact / len(blocks), tokens, len(blocks))


def _bytes(tokenizer: PreTrainedTokenizerBase, blocks: list[Block]) -> int:
    """UTF-8 bytes of the predicted tokens; the end-of-text token has none."""
    # Decoded as one: a character may begin in one block and end in the next.
    predicted = [t for b in blocks for t in b.labels[1:] if t != IGNORE]
    return max(1, len(str(tokenizer.decode(predicted, skip_special_tokens=True)).encode()))
