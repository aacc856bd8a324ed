"""Data: what is built in is clean, what is read is whole, what is bad is refused, and labels mask what they should."""

from __future__ import annotations

import json
import random
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_nb as ln
from lora_nb import datasets
from lora_nb.blocks import IGNORE, Block, batches, encode_text, prompt_of, start_ids
from lora_nb.errors import ConfigError, DatasetError
from tests.text import BOS, EOS, PAD, byte_llama, byte_tokenizer, stored

TOKENIZERS = {"bos": byte_tokenizer(), "no bos": byte_tokenizer(bos=False)}
PAIRS = [("one", "eins"), ("two", "zwei"), ("three", "drei")]
quick = settings(max_examples=40, deadline=None, database=None)
written = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(str.strip)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


# ---- what is built in ------------------------------------------------------------------------------------------------


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def sentences(data: ln.Dataset) -> list[str]:
    return [s for p in data for s in ((p.prompt, p.completion) if data.name == "tone" else (p.prompt,))]


@pytest.mark.parametrize("name", ["tone", "topics"])
def test_built_in_data_is_plenty_in_both_languages(name: str) -> None:
    for split, least in (("train", 800), ("test", 200)):
        data = ln.dataset(name, split)
        assert (data.name, data.split, data.kind) == (name, split, "pairs")
        assert len(data) >= least
        assert all(p.prompt == p.prompt.strip() and p.completion == p.completion.strip() and p.prompt and p.completion for p in data)
        for lang in ("en", "fr"):
            part = data.language(lang)
            assert {p.lang for p in part} == {lang}
            assert 0.4 * len(data) <= len(part) <= 0.6 * len(data)
    assert len(ln.dataset(name)) + len(ln.dataset(name, "test")) >= 1000
    assert ln.dataset(name) == ln.dataset(name, "train")


@pytest.mark.parametrize("name", ["tone", "topics"])
def test_built_in_data_has_no_duplicates(name: str) -> None:
    said = Counter(" ".join(p.prompt.casefold().split()) for split in ("train", "test") for p in ln.dataset(name, split))
    assert [s for s, n in said.items() if n > 1] == []


@pytest.mark.parametrize("name", ["tone", "topics"])
def test_nothing_held_out_is_in_training_nor_nearly(name: str) -> None:
    by_size: dict[int, list[tuple[frozenset[str], str]]] = {}
    for sentence in sentences(ln.dataset(name)):
        by_size.setdefault(len(words(sentence)), []).append((words(sentence), sentence))
    near = []
    for sentence in sentences(ln.dataset(name, "test")):
        bag = words(sentence)
        for size, bags in by_size.items():
            if 0.8 * len(bag) <= size <= len(bag) / 0.8:  # no other size reaches a Jaccard index of 0.8
                near += [(sentence, other) for seen, other in bags if len(bag & seen) >= 0.8 * len(bag | seen)]
    assert near == []


def test_tone_changes_every_sentence() -> None:
    assert [p for split in ("train", "test") for p in ln.dataset("tone", split) if p.prompt == p.completion] == []


@pytest.mark.parametrize(("split", "ratio"), [("train", 1.25), ("test", 2.0)])
def test_topics_are_balanced(split: str, ratio: float) -> None:
    for lang, labels in (("en", {"finance", "health", "law"}), ("fr", {"finance", "santé", "droit"})):
        counts = Counter(ln.dataset("topics", split).language(lang).completions)
        assert counts.keys() == labels
        assert max(counts.values()) <= ratio * min(counts.values())


def test_stdlib_is_this_pythons_own_text_divided_by_file() -> None:
    train, test = ln.dataset("stdlib"), ln.dataset("stdlib", "test")
    assert train.kind == test.kind == "text"
    assert set(train).isdisjoint(test)
    source = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")
    assert [source in train, source in test].count(True) == 1
    assert sum(map(len, train)) > 1_000_000
    assert sum(map(len, test)) > 100_000
    assert all(t.strip() for t in (*train, *test))
    # What the build left of its own machine: paths and compiler flags.
    assert not any("build_time_vars = {" in t for t in (*train, *test))


@pytest.fixture(scope="module")
def planted():
    """`planted` on a handful of texts, and what was made of it already."""
    made: dict[tuple[int, int], ln.Dataset] = {}
    few = {name: datasets._pairs_of(name, "test")[:12] for name in ("tone", "topics")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "_pairs_of", lambda name, _split: few[name])
        for rank, seed in ((2, 0), (2, 1), (3, 0)):
            made[rank, seed] = ln.dataset("planted", "test", rank=rank, seed=seed)
        again = ln.dataset("planted", "test", rank=2, seed=0)
    return made, again


def test_planted_labels_come_back_by_seed(planted) -> None:
    made, again = planted
    first = made[2, 0]
    assert list(first) == list(again)
    assert first.name == "planted-rank2-seed0"
    for other in (made[2, 1], made[3, 0]):
        assert [b.input_ids for b in other] == [b.input_ids for b in first]
        assert [b.labels for b in other] != [b.labels for b in first]


def test_planted_blocks(planted) -> None:
    blocks = list(planted[0][2, 0])
    assert {len(b.input_ids) for b in blocks[:-1]} == {128}
    assert 1 < len(blocks[-1].input_ids) <= 128
    for block in blocks:
        assert len(block.labels) == len(block.input_ids)
        assert block.labels[0] == IGNORE
        assert all(0 <= label < 6144 for label in block.labels[1:])


@torch.no_grad()
def test_planted_labels_are_the_teachers(planted) -> None:
    """The teacher is built here anew, as plain weights: its loss is its entropy, the base's is above it."""
    data = planted[0][2, 1]
    base, tokenizer = ln.load("tiny", device="cpu")
    base_loss = ln.evaluate(base, tokenizer, data).loss
    draw = torch.Generator().manual_seed(1)  # the seed of this data
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            rows, columns = module.weight.shape
            A, B = torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw)
            module.weight += 0.3 * module.weight.norm() / (B @ A).norm() * (B @ A)
    own, entropy = [], []
    for block in data:
        p = base(torch.tensor([block.input_ids])).logits[0, :-1].log_softmax(-1)
        own.append(-p.gather(1, torch.tensor(block.labels[1:])[:, None])[:, 0])
        entropy.append(-(p.exp() * p).sum(-1))
    gap = torch.cat(own) - torch.cat(entropy)  # mean 0 for labels drawn from p
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5
    assert torch.cat(own).mean() < base_loss - 0.02
    assert torch.cat(entropy).mean() < base_loss - 0.02


def test_planted_refuses_a_rank_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="r must be"):
        ln.dataset("planted", rank=0)


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stored(tmp_path, "a.txt", "at home")
    assert list(ln.dataset("~/a.txt")) == ["at home"]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (["one", "two"], "text"),
        (("one", "two"), "text"),
        (np.array(["one", "two"]), "text"),
        (PAIRS, "pairs"),
        ([list(p) for p in PAIRS], "pairs"),
        ([ln.Pair(*p) for p in PAIRS], "pairs"),
        ((p for p in PAIRS), "pairs"),
        ([{"text": "one"}], "text"),
        ([Block([1, 5, 6], [IGNORE, 5, 6])], "blocks"),
    ],
)
def test_lists(source, kind: str) -> None:
    data = ln.dataset(source)
    assert data.kind == kind
    assert data.name == "list"
    if kind == "pairs":
        assert list(data) == [ln.Pair(*p) for p in PAIRS]


def test_a_dataset_is_a_sequence_that_shows_itself() -> None:
    data = ln.dataset([("<b>one</b>", "eins"), *PAIRS[1:]])
    assert (len(data), data[1]) == (3, ln.Pair("two", "zwei"))
    assert list(data[1:]) == list(data)[1:]
    assert (data.prompts[1], data.completions[1]) == ("two =>", "zwei")
    assert "list (all): 3 pairs" in repr(data)
    assert "two => zwei" in repr(data)
    assert "&lt;b&gt;one" in data._repr_html_()
    assert "<b>one" not in data._repr_html_()
    blocks = ln.dataset([Block([1, 2], [IGNORE, 2])])
    assert "2 tokens" in repr(blocks)
    with pytest.raises(DatasetError, match="holds blocks, not pairs"):
        _ = blocks.prompts


# ---- splits ----------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(written, min_size=1, unique=True), st.lists(written))
def test_splits_are_disjoint_complete_and_stable(old: list[str], more: list[str]) -> None:
    old = [*old, "first", "second"]  # never a single text, which is divided otherwise
    parts = {split: split_of(old, split) for split in ("train", "test")}
    assert set(parts["train"]).isdisjoint(parts["test"])
    assert sorted([*parts["train"], *parts["test"]]) == sorted(old)
    mixed = [*old, *more]
    random.Random(0).shuffle(mixed)
    for split, part in parts.items():
        assert set(part) <= set(split_of(mixed, split))


def split_of(texts: list[str], split: str) -> list[str]:
    try:
        return list(ln.dataset(texts, split))
    except DatasetError:
        return []


def test_a_tenth_is_held_out_of_files_too(tmp_path: Path) -> None:
    path = stored(tmp_path, "a.jsonl", "\n".join(json.dumps([f"prompt {i}", f"completion {i}"]) for i in range(1000)))
    train, test = ln.dataset(path, "train"), ln.dataset(path, "test")
    assert 60 <= len(test) <= 140
    assert len(train) + len(test) == 1000
    assert set(train).isdisjoint(test)
    assert (train.split, test.split) == ("train", "test")


def test_of_a_single_text_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1001))
    path = stored(tmp_path, "a.txt", text)
    (train,), (test,) = ln.dataset(path, "train"), ln.dataset(path, "test")
    assert train + test == text
    assert len(test) == 101


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "is empty: give it"),
        ([1], "entry 0 is a int; a text or a pair"),
        (["one", ""], "entry 1 has '' where text is needed"),
        ([("one", 1)], "entry 0 has 1 where text is needed"),
        ([ln.Pair("one", " ")], "entry 0 has ' ' where text is needed"),
        ([{"label": "one"}], "entry 0 has the columns 'label'"),
        (["one", ("two", "zwei")], "mixes texts and pairs"),
        ({"prompt": ["one"], "completion": ["eins"]}, r"not from a dict; .* rows, as in table.to_dict\('records'\)"),
        (None, "not from a NoneType"),
        (7, "not from a int"),
    ],
)
def test_bad_lists(source, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        ln.dataset(source)


def test_a_table_object_is_not_taken_for_its_column_names() -> None:
    class Table(list):  # as pandas' DataFrame: iterating gives the columns' names
        columns = ("prompt", "completion")

    with pytest.raises(DatasetError, match=r"not from a Table.*to_dict"):
        ln.dataset(Table(Table.columns))


@pytest.mark.parametrize(
    ("source", "split", "said"),
    [
        ("tonne", None, "no file 'tonne' .*Did you mean 'tone'"),
        ("tone", "tset", "no split 'tset'.*Did you mean 'test'"),
        ("planted", "validation", "no split 'validation'.*test, train"),
        (["one", "two"], "tests", "no split 'tests'.*Did you mean 'test'"),
        (["one", "two"], 3, "no split 3"),
        ("./folder/thing", None, "There is no file"),
        ("a/b/c", None, "There is no file"),
        ("", None, "There is no file"),
    ],
)
def test_bad_names(source, split, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        ln.dataset(source, split)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    stored(tmp_path, "sentences.csv", "text\none\n")
    with pytest.raises(DatasetError, match=r"There is no file .*sentence\.csv' .*Did you mean 'sentences\.csv'"):
        ln.dataset(tmp_path / "sentence.csv")
    with pytest.raises(DatasetError, match="There is no file"):
        ln.dataset(tmp_path)  # a folder


def test_a_split_that_would_be_empty() -> None:
    with pytest.raises(DatasetError, match="The 2 examples of 'list' leave none for 'test': bring more"):
        ln.dataset(["one", "two"], "test")
    with pytest.raises(DatasetError, match="is empty"):
        ln.dataset("tone").language("de")


def test_the_hub_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # import raises ImportError
    for name in ("owner/data", "owner/data-v1.5"):
        with pytest.raises(DatasetError, match=r"pip install 'lora-nb\[hub\]'"):
            ln.dataset(name)
    with pytest.raises(DatasetError, match="There is no file"):
        ln.dataset("folder/notes.txt")  # a path, whatever its form


def test_the_hub_in_reach_and_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if name == "owner/away":
            raise ConnectionError("Couldn't reach the Hub (offline mode)\nsecond line")
        return [{"text": "one", "label": "eins"}]

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset, raising=False)
    data = ln.dataset("owner/data", "validation")
    assert list(data) == [ln.Pair("one", "eins")]
    assert (data.name, data.split) == ("owner/data", "validation")
    with pytest.raises(DatasetError, match=r"'owner/away' \(split 'train'\) does not load: Couldn't reach .*\. Check its name") as caught:
        ln.dataset("owner/away")
    assert "second line" not in str(caught.value)
    assert asked == [("owner/data", "validation"), ("owner/away", "train")]


def test_the_hub_library_offline() -> None:
    """The library itself, as tests/conftest.py keeps it off the network."""
    pytest.importorskip("datasets")
    with pytest.raises(DatasetError, match=r"'lora-nb-tests/no-such-data'.*does not load"):
        ln.dataset("lora-nb-tests/no-such-data")


# ---- token blocks ----------------------------------------------------------------------------------------------------


@quick
@given(st.sampled_from(list(TOKENIZERS)), st.lists(st.tuples(written, written), min_size=1, max_size=4))
def test_labels_mask_exactly_the_prompt_and_the_start(which: str, pairs: list[tuple[str, str]]) -> None:
    tokenizer = TOKENIZERS[which]
    for (prompt, completion), block in zip(pairs, ln.dataset(pairs).encode(tokenizer, 256), strict=True):
        masked = block.labels.count(IGNORE)
        assert set(block.labels[:masked]) == {IGNORE}
        assert block.labels[masked:] == block.input_ids[masked:]
        assert block.labels[-1] == EOS  # learnt, so that the model stops
        start = start_ids(tokenizer)
        assert start == ([BOS] if which == "bos" else [])
        assert block.input_ids[: len(start)] == start
        assert tokenizer.decode(block.input_ids[len(start) : masked]) == prompt_of(prompt) == f"{prompt.strip()} =>"
        assert tokenizer.decode(block.labels[masked:]) == f" {completion.strip()}</s>"


@quick
@given(st.sampled_from(list(TOKENIZERS)), st.lists(written, min_size=1, max_size=6), st.integers(2, 40))
def test_text_blocks_hold_every_token_once(which: str, texts: list[str], seq_len: int) -> None:
    tokenizer = TOKENIZERS[which]
    start = start_ids(tokenizer)
    stream = [t for text in texts for t in (*tokenizer(text)["input_ids"], EOS)]
    try:
        blocks = ln.dataset(texts).encode(tokenizer, seq_len)
    except DatasetError:
        assert len(stream) + len(start) < seq_len
        return
    held = [t for b in blocks for t in b.input_ids[len(start) :]]
    # Without a start token a last row of one token would have nothing to predict: it is left out.
    assert held == (stream if start or len(stream) % seq_len != 1 else stream[:-1])
    assert {len(b.input_ids) for b in blocks[:-1]} <= {seq_len}
    assert all(b.input_ids == [*start, *b.input_ids[len(start) :]] for b in blocks)
    assert all(b.labels == [*[IGNORE] * len(start), *b.input_ids[len(start) :]] for b in blocks)
    assert all(len(b.input_ids) > 1 for b in blocks)


def test_the_embedded_tokenizer_gives_back_the_completion() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(ln.__file__).parent / "tiny")
    data = ln.dataset("tone", "test")[:40]
    for pair, block in zip(data, data.encode(tokenizer, 256), strict=True):
        learnt = [t for t in block.labels if t != IGNORE]
        assert learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learnt[:-1]).strip() == pair.completion
        given_ = tokenizer.decode(block.input_ids[len(start_ids(tokenizer)) : len(block.labels) - len(learnt)])
        assert given_ == f"{pair.prompt} =>"


def test_pairs_that_are_cut_or_left_out_are_counted(tokenizer) -> None:
    data = ln.dataset([("a", "b"), ("a", "long completion"), ("a prompt that is much longer", "b")])
    with pytest.warns(UserWarning, match="2 of 3 pairs of 'list' are longer than seq_len=8: 1 were cut, 1 left out"):
        blocks = data.encode(tokenizer, 8)
    assert [len(b.input_ids) for b in blocks] == [len(start_ids(tokenizer)) + len("a => b") + 1, 8]
    assert EOS in blocks[0].labels
    assert EOS not in blocks[1].labels
    with pytest.raises(DatasetError, match="No pair of 'list' leaves room for its completion in seq_len=4: raise seq_len"):
        data.encode(tokenizer, 4)


def test_planted_blocks_that_are_cut_are_counted(tokenizer) -> None:
    data = ln.dataset([Block([1, 5, 6, 7], [IGNORE, 8, 9, 10]), Block([1, 5], [IGNORE, 8])])
    assert data.encode(tokenizer, 4) == list(data)
    with pytest.warns(UserWarning, match="1 of 2 blocks of 'list' are longer than seq_len=3 and were cut"):
        assert data.encode(tokenizer, 3) == [Block([1, 5, 6], [IGNORE, 8, 9]), Block([1, 5], [IGNORE, 8])]


def test_what_cannot_be_encoded(tokenizer) -> None:
    with pytest.raises(DatasetError, match="'list' has 4 tokens, less than one block of seq_len=64: bring more text or set seq_len=4"):
        ln.dataset(["one"]).encode(tokenizer, 64)
    for length in (1, 0, -3):
        with pytest.raises(DatasetError, match="a block needs at least 2 tokens"):
            ln.dataset(["some text"]).encode(tokenizer, length)
    endless = byte_tokenizer()
    endless.eos_token = None
    for data in (ln.dataset(PAIRS), ln.dataset(["some text"])):
        with pytest.raises(DatasetError, match=r"no end-of-text token.*set tokenizer\.eos_token"):
            data.encode(endless, 8)


def test_a_long_text_is_tokenized_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 10
    assert len(encode_text("long", ["x" * 500], tokenizer, 64)) == 8
    assert caplog.records == []


def test_batches_pad_on_the_right_in_the_order_asked_for() -> None:
    blocks = [Block([5, 6, 7], [IGNORE, 6, 7]), Block([8], [IGNORE]), Block([9, 10], [IGNORE, 10])]
    (ids, labels), (last, last_labels) = batches(blocks, 2, PAD, [2, 0, 1])
    assert ids.tolist() == [[9, 10, PAD], [5, 6, 7]]
    assert labels.tolist() == [[IGNORE, 10, IGNORE], [IGNORE, 6, 7]]
    assert (last.tolist(), last_labels.tolist()) == ([[8]], [[IGNORE]])
    assert byte_llama()(ids).logits.shape == (2, 3, 259)


@pytest.mark.parametrize("extra", [{"rank": 4}, {"seed": 0}])
@pytest.mark.parametrize("source", ["tone", [("a", "b")]])
def test_rank_and_seed_are_refused_where_they_mean_nothing(source: object, extra: dict[str, int]) -> None:
    with pytest.raises(DatasetError, match="planted"):
        ln.dataset(source, **extra)
