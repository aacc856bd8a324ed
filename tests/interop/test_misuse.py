"""What users of LoRA tools stumble over, side by side: whether PEFT says a word, and that lora_nb refuses it with the remedy.

The threads where users tell of it are named with each; the README has the table.
"""

import json
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_nb as ln
from lora_nb.errors import AdapterError, AdapterFileError, LoraNbError, TargetError
from tests.models import tiny_llama, token_ids
from tests.text import byte_llama, byte_tokenizer

WEIGHTS = "adapter_model.safetensors"
SETTINGS = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def heard(act: Callable[[], object]) -> str:
    """What a user gets to hear: silence, a warning, or an error. Which names a library will drop is another matter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except Exception:  # noqa: BLE001 - whichever it is
            return "error"
    return "warning" if any(not issubclass(w.category, FutureWarning | DeprecationWarning) for w in caught) else "silence"


# ---- settings that mean nothing (peft #1959 #40 #3554 #3658 #3693, trl #6773) ---------------------------------------

SETTINGS_THAT_MEAN_NOTHING = {
    "one of two names misspelt": ({"target_modules": ["q_proj", "v_prj"]}, "silence", "Did you mean 'v_proj'?"),
    "all names misspelt": ({"target_modules": ["q_prj", "v_prj"]}, "error", "Did you mean 'q_proj'?"),
    "modules_to_save misspelt": ({"modules_to_save": ["lm_haed"]}, "silence", "Did you mean 'lm_head'?"),
    "exclude_modules misspelt": ({"target_modules": "all-linear", "exclude_modules": ["k_prj"]}, "warning", "Did you mean 'k_proj'?"),
    "a layer that is not there": (
        {"layers_to_transform": [1, 5]},
        "silence",
        "layer 5, but among the modules targeted there are layers 0 to 2",
    ),
    "a rank_pattern that matches nothing": ({"rank_pattern": {"k_proj": 2}}, "warning", "rank_pattern has the key 'k_proj'"),
    "a rank above the layer's size": ({"r": 17}, "silence", "32 × 16: its update cannot have a rank above 16. Lower r"),
}


@pytest.mark.parametrize("case", SETTINGS_THAT_MEAN_NOTHING)
def test_settings_that_mean_nothing(case: str) -> None:
    changes, said, remedy = SETTINGS_THAT_MEAN_NOTHING[case]
    assert heard(lambda: peft.get_peft_model(tiny_llama(), peft.LoraConfig(**SETTINGS | changes))) == said
    with pytest.raises(TargetError) as refusal:
        ln.attach(tiny_llama(), ln.LoraConfig(**SETTINGS | changes))
    assert remedy in str(refusal.value)


# ---- files of another base, or not whole (peft #1932 #2699 #2566 #1323; an empty file: alpaca-lora #293, qlora #38) ---


@dataclass(frozen=True)
class Harm:
    """What is done to a saved adapter, the base that it is then loaded on, what PEFT says, and what we say."""

    said: str
    remedy: str
    base: Callable[[], nn.Module] = tiny_llama
    act: Callable[[Path], object] = lambda _folder: None


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def flip(folder: Path) -> None:
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-2] ^= 1
    (folder / WEIGHTS).write_bytes(whole)


FILES = {
    "another base of the same shape": Harm("silence", "trained on another base", lambda: tiny_llama(seed=1)),
    "a base of fewer layers": Harm("silence", "has 4 tensors that its config does not place", lambda: tiny_llama(layers=2)),
    "a base of more layers": Harm("warning", "lacks 4 of 16 tensors that its config asks for", lambda: tiny_llama(layers=4)),
    "a key that is missing": Harm("warning", "lacks 1 of 12 tensors", act=tensors(lambda t: dict(list(t.items())[1:]))),
    "a key too many": Harm("silence", "has 1 tensors that its config does not place", act=tensors(lambda t: t | {"more": torch.ones(2)})),
    "keys without their prefix": Harm(
        "warning",
        "Load the base that it was trained on",
        act=tensors(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}),
    ),
    "no tensors, a file of some bytes": Harm("warning", "it has 'none at all'", act=tensors(lambda _: {})),
    "one bit that has flipped": Harm("silence", "holds other values than were saved: it is damaged", act=flip),
    "an alpha that someone edited": Harm("silence", "adapter_config.json was edited", act=lambda folder: edit(folder, lora_alpha=20)),
}


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved(folder: Path) -> Path:
    model = tiny_llama()
    ln.attach(model, ln.LoraConfig(**SETTINGS))
    with torch.no_grad():
        for p in ln.parameters(model).values():
            p.normal_(std=0.1)
    return ln.save(model, folder)


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit(case: str, tmp_path: Path) -> None:
    harm, folder = FILES[case], saved(tmp_path / "adapter")
    harm.act(folder)
    assert heard(lambda: peft.PeftModel.from_pretrained(harm.base(), folder)) == harm.said
    model = harm.base()
    with pytest.raises(AdapterFileError) as refusal:
        ln.load_adapter(model, folder)
    assert harm.remedy in str(refusal.value)
    assert not hasattr(model, "lora_nb_adapters")


def test_what_was_saved_is_what_is_in_the_file(tmp_path: Path) -> None:
    """The empty file of 443 bytes came from a state dict that lacked the adapter; here a save reads back what it wrote."""
    folder = saved(tmp_path)
    (length,) = struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])
    held = sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    assert ln.inspect(folder).parameters == held == 3 * 4 * (32 + 32 + 32 + 16)
    assert (folder / WEIGHTS).stat().st_size == 8 + length + 4 * held


# ---- going on (peft #184 #282 #574 #793, trl #6700) -----------------------------------------------------------------


def test_a_loaded_adapter_trains(tmp_path: Path) -> None:
    """PEFT loads for inference unless it is told otherwise, and then nothing trains."""
    folder = saved(tmp_path)
    theirs, ours = peft.PeftModel.from_pretrained(tiny_llama(), folder), tiny_llama()
    assert not [p for p in theirs.parameters() if p.requires_grad]
    report = ln.load_adapter(ours, folder)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == report.trainable > 0


def test_a_second_adapter_of_the_same_name_is_refused() -> None:
    """PEFT warns, and wraps what is wrapped."""
    model = tiny_llama()
    twice = lambda: peft.get_peft_model(peft.get_peft_model(model, peft.LoraConfig(**SETTINGS)), peft.LoraConfig(**SETTINGS))  # noqa: E731
    assert heard(twice) == "warning"
    ours = tiny_llama()
    ln.attach(ours, ln.LoraConfig(**SETTINGS))
    with pytest.raises(AdapterError, match=r"already has an adapter 'default': choose another name, or detach\(model, 'default'\) first"):
        ln.attach(ours, ln.LoraConfig(**SETTINGS))


# ---- embeddings: saved by surprise, parted by surprise (peft #1689 #2898 #3585 #2018 #2777) --------------------------


def test_an_adapted_embedding_is_saved_as_an_adapter(tmp_path: Path) -> None:
    settings = SETTINGS | {"target_modules": ["embed_tokens"]}
    assert heard(lambda: peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "theirs")) == "warning"
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "theirs" / WEIGHTS)
    ours = tiny_llama()
    ln.attach(ours, ln.LoraConfig(**settings))
    assert sorted(load_file(ln.save(ours, tmp_path / "ours") / WEIGHTS)) == [
        f"base_model.model.model.embed_tokens.lora_embedding_{letter}" for letter in "AB"
    ]


def test_a_tied_head_is_parted_aloud_and_merged_as_it_acts() -> None:
    settings = SETTINGS | {"target_modules": ["embed_tokens"]}
    theirs, ours = tiny_llama(tied=True), tiny_llama(tied=True)
    assert heard(lambda: peft.get_peft_model(theirs, peft.LoraConfig(**settings)).merge_and_unload()) == "warning"
    report = ln.attach(ours, ln.LoraConfig(**settings))
    assert "model.embed_tokens shares its weight with lm_head in the base" in report.notes[0]
    with torch.no_grad():
        for p in ln.parameters(ours).values():
            p.normal_(std=0.3)
        before = ours(input_ids=token_ids()).logits
        ln.merge(ours)
        assert (ours(input_ids=token_ids()).logits - before).abs().max() < 1e-4  # PEFT's moves the head too: see test_matrix.py


# ---- gradient checkpointing on a frozen base (peft #137 #1142, transformers #26334, open-unlearning #178) ------------


def test_with_gradient_checkpointing_b_moves() -> None:
    """With PEFT alone the blocks get an input without gradient, and the reentrant kind of checkpointing gives none on."""
    theirs = peft.get_peft_model(byte_llama(), peft.LoraConfig(**SETTINGS)).train()
    ids = token_ids()

    def step() -> None:
        theirs.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        theirs.base_model.model.disable_input_require_grads()
        theirs(input_ids=ids, labels=ids).loss.backward()

    assert heard(step) == "error"
    assert all(p.grad is None for p in theirs.parameters())

    ours = byte_llama()
    ln.attach(ours, ln.LoraConfig(**SETTINGS))
    data = ln.dataset(["a text to learn " * 20])
    ln.train(
        ours, byte_tokenizer(), data, ln.TrainConfig(max_steps=1, batch_size=2, seq_len=32, gradient_checkpointing=True, learning_rate=1e-2)
    )
    moved = {path: bool(p.any()) for path, p in ln.parameters(ours).items() if path.endswith("lora_B")}
    assert all(moved.values()), moved
    assert len(moved) == 4


def test_all_of_it_is_one_kind_of_error() -> None:
    assert all(issubclass(kind, LoraNbError) for kind in (TargetError, AdapterError, AdapterFileError))
