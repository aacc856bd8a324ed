"""Data to train on: built in, from files, lists or the Hub; and from text to token blocks with their label masks.

A pair is written as `prompt => completion` and ends with the end-of-text token; only the completion and that token are
learnt. Text is one long stream, documents divided by the end-of-text token, cut into blocks of `seq_len`.
"""

from __future__ import annotations

import csv
import json
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lora_nb.errors import DatasetError, nearest
from lora_nb.render import html_table, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # a label that the loss leaves out, as everywhere in PyTorch
BUILT_IN = ("stdlib", "tone", "topics", "planted")
DATA = Path(__file__).parent / "data"
# Column names that say what a table holds, the first that fits wins.
PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("formal", "informal"),
    ("text", "label"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
)


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion to learn."""

    prompt: str
    completion: str
    lang: str = ""

    def __str__(self) -> str:
        return f"{self.prompt} => {self.completion}"


class Block(NamedTuple):
    """Tokens of one row and, for each, itself as a label or `IGNORE`; label t is predicted from the tokens before t."""

    input_ids: list[int]
    labels: list[int]


Example = str | Pair | Block


@dataclass(frozen=True)
class Dataset:
    """Examples of one kind: texts, pairs, or blocks of tokens."""

    name: str
    split: str
    examples: Sequence[Example] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.examples:
            raise DatasetError(f"The data set {self.name!r} ({self.split}) is empty: there is nothing to train on.")

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, index: int | slice) -> Any:
        """One example, or with a slice a smaller data set."""
        return replace(self, examples=self.examples[index]) if isinstance(index, slice) else self.examples[index]

    @property
    def kind(self) -> str:
        """`"text"`, `"pairs"` or `"blocks"`."""
        return {str: "text", Pair: "pairs", Block: "blocks"}[type(self.examples[0])]

    @property
    def prompts(self) -> list[str]:
        """The prompts of pairs as the model sees them, ready for `generate`."""
        return [prompt_of(e.prompt) for e in self._pairs()]

    @property
    def completions(self) -> list[str]:
        return [e.completion for e in self._pairs()]

    def language(self, lang: str) -> Dataset:
        """Only the pairs of one language, `"en"` or `"fr"`, of the built-in data."""
        return replace(self, name=f"{self.name}-{lang}", examples=[e for e in self._pairs() if e.lang == lang])

    def encode(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Block]:
        """Token blocks of at most `seq_len`.

        Raises:
            DatasetError: text that does not fill a single block, pairs whose completion does not fit.
        """
        if self.kind == "pairs":
            return _encode_pairs(self.name, self._pairs(), tokenizer, seq_len)
        if self.kind == "blocks":
            return [Block(e.input_ids[:seq_len], e.labels[:seq_len]) for e in self.examples]  # type: ignore[union-attr]
        return _encode_text(self.name, self.examples, tokenizer, seq_len)  # type: ignore[arg-type]

    def _pairs(self) -> list[Pair]:
        if self.kind != "pairs":
            raise DatasetError(f"The data set {self.name!r} holds {self.kind}, not pairs: it has no prompts and completions.")
        return list(self.examples)  # type: ignore[arg-type]

    def _title(self) -> str:
        return f"{self.name} ({self.split}): {len(self):,} {'texts' if self.kind == 'text' else self.kind}"

    def _sample(self) -> list[tuple[str]]:
        return [(_short(e),) for e in self.examples[:3]]

    def __repr__(self) -> str:
        return text_table([self._title()], self._sample())

    def _repr_html_(self) -> str:
        return html_table([self._title()], self._sample())


def prompt_of(text: str) -> str:
    """A pair's prompt as the model sees it; the completion follows after a space."""
    return f"{text.strip()} =>"


def dataset(source: str | Path | Sequence[object], split: str | None = None, *, rank: int = 8, seed: int = 0) -> Dataset:
    """Examples to train or evaluate on.

    Args:
        source: `"stdlib"` (this Python's own library as text), `"tone"` (formal => informal), `"topics"` (text => label),
            `"planted"` (labels from the embedded base plus a random update of known rank); a .txt, .md, .py, .csv, .tsv or
            .jsonl file; a Hub id (needs the `hub` extra); or a list of texts or of (prompt, completion) pairs.
        split: `"train"` or `"test"`. Built-in data default to `"train"`; files and lists to all there is, and with a split
            to a fixed tenth for `"test"` and the rest for `"train"`.
        rank, seed: for `"planted"` only: the rank of the update, and what makes it.

    Raises:
        DatasetError: no such source, split or column; a file that cannot be read; nothing in it.
    """
    if not isinstance(source, str | Path):
        return _held_out(Dataset("list", split or "all", [_example(e, f"entry {i}") for i, e in enumerate(source)]), split)
    name = str(source)
    if name in BUILT_IN:
        wanted = split or "train"
        if wanted not in ("train", "test"):
            raise DatasetError(f"{name!r} has no split {wanted!r}." + nearest(wanted, ["train", "test"]))
        if name == "planted":
            return planted(rank, seed, wanted)
        return Dataset(name, wanted, _stdlib(wanted) if name == "stdlib" else _pairs_of(name, wanted))
    path = Path(name).expanduser()
    if path.is_file():
        return _held_out(Dataset(path.name, split or "all", _read(path)), split)
    if "/" in name and name.count("/") == 1 and not path.suffix and not path.exists():
        return _from_hub(name, split)
    raise DatasetError(f"There is no file {name!r} and no built-in data set of that name." + nearest(name, BUILT_IN))


def _held_out(whole: Dataset, split: str | None) -> Dataset:
    """A tenth of the examples by hash, so that it stays the same when examples are added; of a single text, its end."""
    if split is None:
        return whole
    if split not in ("train", "test"):
        raise DatasetError(f"{whole.name!r} has no split {split!r}." + nearest(split, ["train", "test"]))
    if len(whole) == 1 and isinstance(whole.examples[0], str):
        text = whole.examples[0]
        cut = len(text) * 9 // 10
        return replace(whole, examples=[text[cut:] if split == "test" else text[:cut]])
    return replace(whole, examples=[e for e in whole.examples if (zlib.crc32(str(e).encode()) % 10 == 0) == (split == "test")])


def _pairs_of(name: str, split: str) -> list[Pair]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("formal", "informal") if name == "tone" else ("text", "label")
    return [Pair(r[keys[0]], r[keys[1]], r["lang"]) for r in rows if r["split"] == split]


def _stdlib(split: str) -> list[str]:
    """Top-level modules of the Python that runs; every tenth by name is held out. Build data holds paths and is left out."""
    files = sorted(p for p in Path(sysconfig.get_path("stdlib")).glob("*.py") if not p.name.startswith("_sysconfigdata"))
    held = {p for i, p in enumerate(files) if i % 10 == 5}
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files if (p in held) == (split == "test")]
    return [t for t in texts if t.strip()]


def _read(path: Path) -> list[Example]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    readers: dict[str, Callable[[str, str], list[Example]]] = {".jsonl": _read_jsonl, ".csv": _read_table, ".tsv": _read_table}
    if path.suffix in readers:
        return readers[path.suffix](text, str(path))
    if path.suffix in (".txt", ".md", ".py", ".rst", ""):
        return [text] if text.strip() else []
    raise DatasetError(f"{str(path)!r}: {path.suffix} files are not read; use .txt, .md, .py, .csv, .tsv or .jsonl.")


def _read_jsonl(text: str, where: str) -> list[Example]:
    out = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{where!r}, line {number} is not JSON: {error}.") from error
        out.append(_example(row, f"{where!r}, line {number}"))
    return out


def _read_table(text: str, where: str) -> list[Example]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if where.endswith(".tsv") else ",")
    try:
        return [_example(row, f"{where!r}, line {rows.line_num}") for row in rows]
    except csv.Error as error:
        raise DatasetError(f"{where!r}, line {rows.line_num} is not a row of a table: {error}.") from error


def _example(row: object, where: str) -> Example:
    """A text, a pair, or a row with columns that say which of the two it is."""
    if isinstance(row, Pair | Block):
        return row
    if isinstance(row, str):
        return _said(row, where)
    if isinstance(row, tuple | list) and len(row) == 2:  # noqa: PLR2004 - a pair
        return Pair(_said(row[0], where), _said(row[1], where))
    if isinstance(row, dict):
        for prompt, completion in PAIR_COLUMNS:
            if prompt in row and completion in row:
                return Pair(_said(row[prompt], where), _said(row[completion], where), str(row.get("lang", "")))
        if "text" in row:
            return _said(row["text"], where)
        known = ", ".join(f"{p}+{c}" for p, c in PAIR_COLUMNS)
        raise DatasetError(f"{where} has the columns {', '.join(map(repr, row))}; one of these is needed: {known}, or text.")
    raise DatasetError(f"{where} is a {type(row).__name__}; a text or a pair (prompt, completion) is needed.")


def _said(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{where} has {value!r} where text is needed.")
    return value


def _from_hub(name: str, split: str | None) -> Dataset:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(f"{name!r} is no file here; to read it from the Hub install the extra: pip install 'lora-nb[hub]'.") from error
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises dozens of kinds, from its own to the network's
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"The Hub data set {name!r} (split {split or 'train'!r}) does not load: {first[:300]}") from error
    return Dataset(name, split or "train", [_example(row, f"{name!r}, row {i}") for i, row in enumerate(rows)])


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


def _encode_pairs(name: str, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Block]:
    start, eos, out, cut = start_ids(tokenizer), _eos(tokenizer), [], 0
    prompts = _tokens([prompt_of(p.prompt) for p in pairs], tokenizer)
    completions = _tokens([f" {p.completion.strip()}" for p in pairs], tokenizer)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = [*start, *prompt, *completion, eos]
        labels = [IGNORE] * (len(start) + len(prompt)) + [*completion, eos]
        cut += len(ids) > seq_len
        if len(start) + len(prompt) < seq_len:
            out.append(Block(ids[:seq_len], labels[:seq_len]))
    if not out:
        raise DatasetError(f"No pair of {name!r} leaves room for its completion in seq_len={seq_len}: raise seq_len.")
    if cut:
        warnings.warn(f"{cut} of {len(pairs)} pairs of {name!r} are longer than seq_len={seq_len} and were cut.", stacklevel=3)
    return out


def _encode_text(name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Block]:
    start, eos = start_ids(tokenizer), _eos(tokenizer)
    stream = [token for ids in _tokens(texts, tokenizer) for token in (*ids, eos)]
    room = seq_len - len(start)
    if len(stream) < room:
        raise DatasetError(
            f"{name!r} has {len(stream)} tokens, less than one block of seq_len={seq_len}: bring more text or set seq_len={len(stream)} or less."
        )
    rows = (stream[i : i + room] for i in range(0, len(stream) - 1, room))
    # The begin-of-text token is given, not learnt; where there is none the loss has no label for the first token anyway.
    return [Block([*start, *row], [*[IGNORE] * len(start), *row]) for row in rows]


def _short(example: Example) -> str:
    text = f"{len(example.input_ids)} tokens" if isinstance(example, Block) else " ".join(str(example).split())
    return text if len(text) <= 110 else text[:109] + "…"  # noqa: PLR2004 - the width of a line


@torch.no_grad()
def planted(rank: int, seed: int, split: str, *, size: float = 0.3) -> Dataset:
    """Blocks whose labels come from a teacher: the embedded base plus a random update of known rank on every linear layer.

    The text is the course's own; the label at each place is drawn from the teacher's distribution there, so the best a
    student can do is the teacher itself, and an update of rank `rank` reaches it.

    Args:
        size: Frobenius norm of each update over that of its weight.
    """
    from tqdm.auto import tqdm

    from lora_nb.attach import attach, weights
    from lora_nb.bases import load
    from lora_nb.configs import LoraConfig

    model, tokenizer = load("tiny", device="cpu")
    attach(model, LoraConfig(r=rank, lora_alpha=rank), "teacher")
    random = torch.Generator().manual_seed(seed)
    for path, w in weights(model, "teacher").items():
        w.lora_A.normal_(generator=random)
        w.lora_B.normal_(generator=random)
        w.lora_B.mul_(size * model.get_submodule(path).weight.norm() / w.delta().norm())
    texts = [p.prompt for name in ("tone", "topics") for p in _pairs_of(name, split)]
    blocks = _encode_text("planted", texts, tokenizer, 128)
    draw = torch.Generator().manual_seed(seed + 1)
    out: list[Example] = []
    for block in tqdm(blocks, desc="asking the teacher", unit="block", delay=2, leave=False):
        probabilities = model(torch.tensor([block.input_ids])).logits[0].softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=draw)[:, 0].tolist()
        out.append(Block(block.input_ids, [IGNORE, *drawn[:-1]]))
    return Dataset(f"planted-rank{rank}-seed{seed}", split, out)


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
