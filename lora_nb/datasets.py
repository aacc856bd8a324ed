"""Data to train on: built in, from files, lists or the Hub. `examples.py` reads their rows, `blocks.py` makes tokens of them."""

from __future__ import annotations

import io
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_nb.blocks import IGNORE, Block, batches, encode_pairs, encode_text, prompt_of, start_ids
from lora_nb.errors import DatasetError, nearest
from lora_nb.examples import Example, Pair, example_of, read_file
from lora_nb.render import html_table, text_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE", "Block", "Dataset", "Pair", "batches", "dataset", "planted", "prompt_of", "start_ids"]

BUILT_IN = ("stdlib", "tone", "topics", "planted")
DATA = Path(__file__).parent / "data"
# 'owner/name'; a dot is part of it only before a version, so that 'data/notes.txt' is a file.
HUB_ID = re.compile(r"\w[\w.-]*/[\w-]+(\.\d[\w.-]*)?")


@dataclass(frozen=True)
class Dataset:
    """Examples of one kind: texts, pairs, or blocks of tokens."""

    name: str
    split: str
    examples: Sequence[Example] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.examples:
            raise DatasetError(f"The data set {self.name!r} ({self.split}) is empty: give it at least one text or pair.")
        if len({type(e) for e in self.examples}) > 1:
            raise DatasetError(f"The data set {self.name!r} mixes texts and pairs, which are learnt differently: make two data sets of it.")

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
        if seq_len < 2:
            raise DatasetError(f"seq_len={seq_len!r}: a block needs at least 2 tokens, one to predict from and one to predict.")
        if self.kind == "pairs":
            return encode_pairs(self.name, [(p.prompt, p.completion) for p in self._pairs()], tokenizer, seq_len)
        if self.kind == "blocks":
            return _cut_blocks(self.name, self.examples, seq_len)  # type: ignore[arg-type]
        return encode_text(self.name, self.examples, tokenizer, seq_len)  # type: ignore[arg-type]

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


def dataset(
    source: str | Path | Sequence[object], split: str | None = None, *, rank: int | None = None, seed: int | None = None
) -> Dataset:
    """Examples to train or evaluate on.

    Args:
        source: `"stdlib"` (this Python's own library as text), `"tone"` (formal => informal), `"topics"` (text => label),
            `"planted"` (labels from the embedded base plus a random update of known rank); a .txt, .md, .py, .csv, .tsv or
            .jsonl file; a Hub id (needs the `hub` extra); or a list of texts or of (prompt, completion) pairs.
        split: `"train"` or `"test"`. Built-in data default to `"train"`; files and lists to all there is, and with a split
            to a fixed tenth for `"test"` and the rest for `"train"`.
        rank, seed: for `"planted"` only: the rank of the update (8) and what makes it (0).

    Raises:
        DatasetError: no such source, split or column; a file that cannot be read; nothing in it.
    """
    if not (isinstance(source, str) and source == "planted") and (rank is not None or seed is not None):
        raise DatasetError("rank and seed say how the data set 'planted' is made; other data have neither. Leave them out.")
    if not isinstance(source, str | Path):
        return _held_out(Dataset("list", split or "all", [example_of(e, f"entry {i}") for i, e in enumerate(_entries(source))]), split)
    name = str(source)
    if name in BUILT_IN:
        wanted = split or "train"
        if wanted not in ("train", "test"):
            raise DatasetError(f"{name!r} has no split {wanted!r}." + nearest(str(wanted), ["train", "test"]))
        if name == "planted":
            return planted(8 if rank is None else rank, seed or 0, wanted)
        return Dataset(name, wanted, _stdlib(wanted) if name == "stdlib" else _pairs_of(name, wanted))
    path = Path(name).expanduser()
    if path.is_file():
        return _held_out(Dataset(path.name, split or "all", read_file(path)), split)
    if HUB_ID.fullmatch(name) and not path.exists():
        return _from_hub(name, split)
    beside = [p.name for p in islice(path.parent.glob("*"), 1000)]
    near = get_close_matches(path.name, [*BUILT_IN, *beside])
    raise DatasetError(f"There is no file {name!r} and no built-in data set of that name." + nearest(path.name, near or BUILT_IN))


def _entries(source: object) -> Iterable[object]:
    """What a list or another iterable holds; a dict or a table would give the names of its columns instead."""
    if isinstance(source, Mapping) or hasattr(source, "columns") or not isinstance(source, Iterable):
        raise DatasetError(
            f"A data set is made from a name, a file or a list of rows, not from a {type(source).__name__}; of a table give "
            "the rows, as in table.to_dict('records')."
        )
    return source


def _held_out(whole: Dataset, split: str | None) -> Dataset:
    """A tenth of the examples by hash, so that it stays the same when examples are added; of a single text, its end."""
    if split is None:
        return whole
    if split not in ("train", "test"):
        raise DatasetError(f"{whole.name!r} has no split {split!r}." + nearest(str(split), ["train", "test"]))
    if len(whole) == 1 and isinstance(whole.examples[0], str):
        text = whole.examples[0]
        cut = len(text) * 9 // 10
        return replace(whole, examples=[text[cut:] if split == "test" else text[:cut]])
    examples = [e for e in whole.examples if (zlib.crc32(str(e).encode()) % 10 == 0) == (split == "test")]
    if not examples:
        raise DatasetError(f"The {len(whole)} examples of {whole.name!r} leave none for {split!r}: bring more, or divide them yourself.")
    return replace(whole, examples=examples)


def _pairs_of(name: str, split: str) -> list[Pair]:
    rows = [json.loads(line) for line in io.StringIO((DATA / f"{name}.jsonl").read_text(encoding="utf-8"))]
    keys = ("formal", "informal") if name == "tone" else ("text", "label")
    return [Pair(r[keys[0]], r[keys[1]], r["lang"]) for r in rows if r["split"] == split]


def _stdlib(split: str) -> list[str]:
    """Top-level modules of the Python that runs; every tenth by name is held out. Build data holds paths and is left out."""
    files = sorted(p for p in Path(sysconfig.get_path("stdlib")).glob("*.py") if not p.name.startswith("_sysconfigdata"))
    held = {p for i, p in enumerate(files) if i % 10 == 5}
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files if (p in held) == (split == "test")]
    return [t for t in texts if t.strip()]


def _from_hub(name: str, split: str | None) -> Dataset:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DatasetError(f"{name!r} is no file here; to read it from the Hub install the extra: pip install 'lora-nb[hub]'.") from error
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises dozens of kinds, from its own to the network's
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        said = f"The Hub data set {name!r} (split {split or 'train'!r}) does not load: {first[:300]}"
        raise DatasetError(f"{said}. Check its name, the split and the network.") from error
    return Dataset(name, split or "train", [example_of(row, f"{name!r}, row {i}") for i, row in enumerate(rows)])


def _cut_blocks(name: str, blocks: Sequence[Block], seq_len: int) -> list[Block]:
    cut = sum(len(b.input_ids) > seq_len for b in blocks)
    if cut:
        warnings.warn(f"{cut} of {len(blocks)} blocks of {name!r} are longer than seq_len={seq_len} and were cut.", stacklevel=3)
    return [Block(b.input_ids[:seq_len], b.labels[:seq_len]) for b in blocks]


def _short(example: Example) -> str:
    text = f"{len(example.input_ids)} tokens" if isinstance(example, Block) else " ".join(str(example).split())
    return text if len(text) <= 110 else text[:109] + "…"  # the width of a line


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
        base = model.get_parameter(f"{path}.weight")
        w.lora_B.mul_(size * base.norm() / w.delta().norm())
    texts = [p.prompt for name in ("tone", "topics") for p in _pairs_of(name, split)]
    blocks = encode_text("planted", texts, tokenizer, 128)
    draw = torch.Generator().manual_seed(seed + 1)
    out: list[Example] = []
    for block in tqdm(blocks, desc="asking the teacher", unit="block", delay=2, leave=False):
        probabilities = model(torch.tensor([block.input_ids])).logits[0].softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=draw)[:, 0].tolist()
        out.append(Block(block.input_ids, [IGNORE, *drawn[:-1]]))
    return Dataset(f"planted-rank{rank}-seed{seed}", split, out)
