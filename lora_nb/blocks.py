"""From text to token blocks with their label masks, and from blocks to batches.

A pair is written as `prompt => completion` and ends with the end-of-text token; only the completion and that token are
learnt. Text is one long stream, documents divided by the end-of-text token, cut into blocks of `seq_len`. Blocks that are
shorter can be packed: several in one row, none of which sees another.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_nb.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # a label that the loss leaves out, as everywhere in PyTorch


class Block(NamedTuple):
    """Tokens of one row and, for each, itself as a label or `IGNORE`; label t is predicted from the tokens before t.

    In a packed row `positions` starts from 0 with each of its documents; a row of one document has none.
    """

    input_ids: list[int]
    labels: list[int]
    positions: Sequence[int] = ()


class Batch(NamedTuple):
    """Rows of one forward: ids and labels (batch, longest), positions likewise where a row is packed, and the rows' numbers."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None
    rows: tuple[int, ...] = ()


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


def pack(blocks: Sequence[Block], seq_len: int) -> list[Block]:
    """Whole blocks gathered into rows of at most `seq_len` tokens: the longest first, each where it leaves the least room.

    (Best fit decreasing; Johnson, 1973.) What was the first token of a block is predicted by nothing, as it was alone.
    """
    rows: list[list[Block]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), in order
    for block in sorted(blocks, key=lambda b: -len(b.input_ids)):
        need = len(block.input_ids)
        at = bisect_left(rooms, (need, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(block)
        insort(rooms, (room - need, row))
    return [row[0] if len(row) == 1 else _joined(row) for row in rows]


def _joined(row: Sequence[Block]) -> Block:
    return Block(
        [token for b in row for token in b.input_ids],
        [label for b in row for label in (IGNORE, *b.labels[1:])],
        [place for b in row for place in range(len(b.input_ids))],
    )


def documents(positions: torch.Tensor) -> torch.Tensor:
    """Which tokens each token of packed rows may see: those of its own document up to itself.

    Args:
        positions: (batch, seq), 0 where a document starts.

    Returns:
        (batch, 1, seq, seq), True where the query (third) sees the key (fourth), as PyTorch's attention takes it.
    """
    document = (positions == 0).cumsum(-1)
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def collate(rows: Sequence[Block], pad_id: int, least: int = 0) -> Batch:
    """Rows padded on the right to the longest of them, and at least to `least` tokens.

    Padding needs no attention mask: a causal model never looks to the right, and padded labels are ignored.
    """
    longest = max(least, *(len(r.input_ids) for r in rows))
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORE)
    positions = torch.zeros(len(rows), longest, dtype=torch.long) if any(r.positions for r in rows) else None
    for k, row in enumerate(rows):
        ids[k, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[k, : len(row.labels)] = torch.tensor(row.labels)
        if positions is not None:
            places = list(row.positions or range(len(row.input_ids)))
            # Padding goes on with the last document: one of its own for each of its tokens would cost attention more.
            positions[k] = torch.tensor([*places, *range(places[-1] + 1, places[-1] + 1 + longest - len(places))])
    return Batch(ids, labels, positions)


def batches(blocks: Sequence[Block], batch_size: int, pad_id: int, order: Iterable[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in the given order, `batch_size` at a time: ids and labels, both (batch, longest)."""
    chosen = list(order)
    for i in range(0, len(chosen), batch_size):
        batch = collate([blocks[j] for j in chosen[i : i + batch_size]], pad_id)
        yield batch.input_ids, batch.labels
