"""From text to token blocks with their label masks, and from blocks to batches.

A pair is written as `prompt => completion` and ends with the end-of-text token; only the completion and that token are
learnt. Text is one long stream, documents divided by the end-of-text token, cut into blocks of `seq_len`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_nb.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # a label that the loss leaves out, as everywhere in PyTorch


class Block(NamedTuple):
    """Tokens of one row and, for each, itself as a label or `IGNORE`; label t is predicted from the tokens before t."""

    input_ids: list[int]
    labels: list[int]


def prompt_of(text: str) -> str:
    """A pair's prompt as the model sees it; the completion follows after a space."""
    return f"{text.strip()} =>"


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before every text: the begin-of-text token, for tokenizers that have one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DatasetError("The tokenizer has no end-of-text token, so a model could not learn to stop: set tokenizer.eos_token.")
    return int(tokenizer.eos_token_id)


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each text, with a bar when it takes longer than two seconds."""
    from tqdm.auto import tqdm

    with tqdm(total=len(texts), desc="tokenizing", unit="text", delay=2, leave=False) as bar:
        for i in range(0, len(texts), 64):
            # The limit is the block's, not the tokenizer's: verbose=False keeps its warning about long texts away.
            chunk = list(texts[i : i + 64])
            yield from tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            bar.update(len(chunk))


def encode_pairs(name: str, pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Block]:
    """One row for each (prompt, completion); what is longer than `seq_len` is cut, or left out if no completion remains.

    Raises:
        DatasetError: not one completion fits, or the tokenizer has no end-of-text token.
    """
    start, eos, out, cut = start_ids(tokenizer), _eos(tokenizer), [], 0
    prompts = _tokens([prompt_of(prompt) for prompt, _ in pairs], tokenizer)
    completions = _tokens([f" {completion.strip()}" for _, completion in pairs], tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*start, *prompt, *completion, eos]
        labels = [IGNORE] * (len(start) + len(prompt)) + [*completion, eos]
        cut += len(ids) > seq_len
        if len(start) + len(prompt) < seq_len:
            out.append(Block(ids[:seq_len], labels[:seq_len]))
    if not out:
        raise DatasetError(f"No pair of {name!r} leaves room for its completion in seq_len={seq_len}: raise seq_len.")
    if cut:
        gone = len(pairs) - len(out)
        said = f"{cut} of {len(pairs)} pairs of {name!r} are longer than seq_len={seq_len}: {cut - gone} were cut, {gone} left out."
        warnings.warn(said, stacklevel=3)
    return out


def encode_text(name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Block]:
    """All texts as one stream, cut into rows of `seq_len`.

    Raises:
        DatasetError: less than one row of text, or the tokenizer has no end-of-text token.
    """
    start, eos = start_ids(tokenizer), _eos(tokenizer)
    stream = [token for ids in _tokens(texts, tokenizer) for token in (*ids, eos)]
    room = seq_len - len(start)
    if len(stream) < room:
        raise DatasetError(
            f"{name!r} has {len(stream)} tokens, less than one block of seq_len={seq_len}: bring more text or set seq_len={len(stream)} or "
            "less."
        )
    # The begin-of-text token is given, not learnt; where there is none, nothing predicts the first token of a row, nor a row of one.
    rows = (stream[i : i + room] for i in range(0, len(stream) if start else len(stream) - 1, room))
    return [Block([*start, *row], [*[IGNORE] * len(start), *row]) for row in rows]


def batches(blocks: Sequence[Block], batch_size: int, pad_id: int, order: Iterable[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in the given order, padded on the right to the longest of their batch: (batch, longest) ids and labels.

    Padding needs no attention mask here: a causal model never looks to the right, and padded labels are ignored.
    """
    chosen = list(order)
    for i in range(0, len(chosen), batch_size):
        rows = [blocks[j] for j in chosen[i : i + batch_size]]
        longest = max(len(r.input_ids) for r in rows)
        ids = torch.full((len(rows), longest), pad_id)
        labels = torch.full((len(rows), longest), IGNORE)
        for k, row in enumerate(rows):
            ids[k, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels[k, : len(row.labels)] = torch.tensor(row.labels)
        yield ids, labels
