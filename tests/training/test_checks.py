"""What makes a run worthless is said: a B that stays at zero, numbers that are none, memory that is full."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.attach import weights
from lora_nb.errors import OutOfMemoryError, TrainingError
from lora_nb.training import loop, memory_use
from lora_nb.training.precision import Precision, default_precision
from tests.models import peft_twin
from tests.text import PAIRS, byte_llama, byte_tokenizer

TOKENIZER = byte_tokenizer()
LORA = ln.LoraConfig(r=4, lora_alpha=12)


def config(**changes) -> ln.TrainConfig:
    return ln.TrainConfig(**{"max_steps": 5, "batch_size": 4, "seq_len": 64, "warmup_steps": 0} | changes)


def adapted(lora: ln.LoraConfig = LORA) -> nn.Module:
    model = byte_llama()
    torch.manual_seed(0)
    ln.attach(model, lora)
    return model


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- B moves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_b_that_the_data_does_not_reach_is_an_error_after_two_steps(packing: bool) -> None:
    model = adapted()
    layer = model.get_submodule("model.layers.1.mlp")
    plain = layer.forward
    layer.forward = lambda x: plain(x).detach() + x * 0  # what comes before it in the layer still learns, through the residual
    seen: list[ln.Step] = []
    with pytest.raises(TrainingError, match=r"After two steps B has not moved in 3 of 14 .*layers.1.mlp.*exclude_modules"):
        ln.train(model, TOKENIZER, PAIRS, config(packing=packing), callbacks=[seen.append])
    assert len(seen) == 1


def test_no_b_that_moves_names_the_likely_cause() -> None:
    model = adapted()
    for w in weights(model, "default").values():
        w.lora_B.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"in 14 of 14 modules.*reentrant.*gradient_checkpointing=True"):
        ln.train(model, TOKENIZER, PAIRS, config())


def test_one_step_is_no_proof() -> None:
    model = adapted(ln.LoraConfig(r=4, lora_alpha=12, target_modules=["embed_tokens", "q_proj"]))
    assert ln.train(model, TOKENIZER, PAIRS, config()).steps == 5  # on an embedding A starts at zero, so B moves second


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_step_and_rows() -> None:
    model = adapted()
    head, calls = model.get_submodule("lm_head"), []
    states: list[dict[str, torch.Tensor]] = []

    def poison(_module, _inputs, out):
        calls.append(1)
        return out * math.nan if len(calls) > 5 else out

    head.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"Step \d has loss nan.*rows of this step.*: (\d, ){3}\d\.") as raised:
        ln.train(model, TOKENIZER, PAIRS, config(), callbacks=[lambda _: states.append(copied(model))])
    step = int(str(raised.value).split()[1])
    work = loop._prepare(adapted(), PAIRS.encode(TOKENIZER, 64), 0, config())
    assert ", ".join(map(str, work.sampler.forward(step - 1).rows)) in str(raised.value)
    for name, p in copied(model).items():
        assert torch.equal(p, states[-1][name])  # the last good state


# ---- memory ----------------------------------------------------------------------------------------------------------


def full_above(rows: int, monkeypatch: pytest.MonkeyPatch, *, light_rows: int = 0) -> list[int]:
    """Memory that holds so many rows of a forward, with activation checkpointing `light_rows`."""
    tried: list[int] = []

    def wrapped(plain: Callable) -> Callable:
        def loss_sum(model, ids, labels, *rest):
            tried.append(len(ids))
            light = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
            if len(ids) > (light_rows if light else rows):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")
            return plain(model, ids, labels, *rest)

        return loss_sum

    for module in (loop, memory_use):
        monkeypatch.setattr(module, "loss_sum", wrapped(module.loss_sum))
    return tried


@pytest.mark.parametrize(
    ("rows", "light", "batch_size", "advice"),
    [
        (2, 0, 8, r"batch_size=2, gradient_accumulation_steps=4 fits"),
        (1, 0, 5, r"batch_size=1, gradient_accumulation_steps=5 fits"),
        (0, 1, 4, r"batch_size=1, gradient_accumulation_steps=4, gradient_checkpointing=True fits"),
        (0, 0, 4, r"not even one row fits.*lower seq_len=64.*quant='nf4'"),
    ],
)
def test_a_full_memory_ends_the_run_and_says_what_fits(rows: int, light: int, batch_size: int, advice: str, monkeypatch) -> None:
    full_above(rows, monkeypatch, light_rows=light)
    model = adapted()
    with pytest.warns(UserWarning, match="Out of memory"):
        run = ln.train(model, TOKENIZER, PAIRS, config(batch_size=batch_size))
    assert (run.steps, run.stopped_by) == (0, "out_of_memory")
    assert re.search(advice, run.notice)
    for part in ("Tried to allocate 2.00 GiB", "frozen weights", "weights that train", "optimizer", "activations and the rest"):
        assert part in run.notice
    assert "More words" not in run.notice
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_what_was_trained_before_the_memory_was_full_is_kept(monkeypatch) -> None:
    model, states = adapted(), []

    def fill(step: ln.Step) -> None:
        states.append(copied(model))
        if step.step == 2:
            full_above(1, monkeypatch)

    with pytest.warns(UserWarning, match="Out of memory"):
        run = ln.train(model, TOKENIZER, PAIRS, config(), callbacks=[fill])
    assert (run.steps, run.stopped_by) == (2, "out_of_memory")
    assert all(torch.equal(p, states[-1][name]) for name, p in copied(model).items())


def test_a_memory_that_is_full_in_the_update_ends_the_run_too(monkeypatch) -> None:
    model, start = adapted(), copied(adapted())

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.warns(UserWarning, match="offload_optimizer=True"):
        run = ln.train(model, TOKENIZER, PAIRS, config())
    assert (run.steps, run.stopped_by) == (0, "out_of_memory")
    assert same(start, copied(model))


def test_steps_raise_it(monkeypatch) -> None:
    full_above(1, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="batch_size=1, gradient_accumulation_steps=4 fits"):
        next(ln.steps(adapted(), TOKENIZER, PAIRS, config()))


def test_another_error_is_not_taken_for_it(monkeypatch) -> None:
    def loss_sum(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "loss_sum", loss_sum)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ln.train(adapted(), TOKENIZER, PAIRS, config())
    assert memory_use.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))


# ---- the same gradients, otherwise computed --------------------------------------------------------------------------


def test_checkpointing_changes_no_gradient_and_is_undone() -> None:
    """To the bit: each layer is computed again from the same input with the same dropout."""
    found = []
    for light in (False, True):
        model = adapted(ln.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.2))
        run = ln.train(model, TOKENIZER, PAIRS, config(gradient_checkpointing=light))
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        found.append((run.losses, copied(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, found[1][1][name]) for name, p in found[0][1].items())


def test_checkpointing_of_a_model_that_cannot() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(259, 259)

        def forward(self, input_ids, **_):
            return type("Out", (), {"logits": self.table(input_ids)})()

    assert ln.train(Other(), TOKENIZER, PAIRS, config()).steps == 5
    with pytest.raises(TrainingError, match="gradient_checkpointing=True: Other is no model of transformers"):
        ln.train(Other(), TOKENIZER, PAIRS, config(gradient_checkpointing=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_follow_32(precision: str) -> None:
    exact = ln.train(adapted(), TOKENIZER, PAIRS, config()).losses
    model = adapted()
    rough = ln.train(model, TOKENIZER, PAIRS, config(precision=precision)).losses
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-2)
    assert {p.dtype for p in ln.parameters(model).values()} == {torch.float32}


def test_a_gradient_that_overflows_in_fp16_costs_a_step_and_halves_the_scale() -> None:
    model = adapted()
    work = loop._prepare(model, PAIRS.encode(TOKENIZER, 64), 0, config(precision="fp16"))
    scales = []
    work.precision.scaler._init_scale = 2.0**45  # beyond fp16's largest number in some product
    turns = loop._turns(work)
    for _ in range(5):
        before = copied(model)
        step = next(turns)
        scales.append(work.precision.scaler.get_scale())
        assert same(before, copied(model)) == (not math.isfinite(step.grad_norm))
    assert scales == sorted(scales, reverse=True)
    assert scales[0] == 2.0**44


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, b[name]) for name, p in a.items())


def test_parameters_in_fp16_cannot_be_stepped() -> None:
    model = byte_llama().half()
    with pytest.raises(TrainingError, match=r"parameters that train are in float16.*p.data.float"):
        Precision(config(precision="fp16"), model, torch.device("cpu"))
    assert default_precision(torch.device("cpu")) == "fp32"


# ---- any model whose parameters ask for gradients --------------------------------------------------------------------


def test_the_loss_curve_is_that_of_pefts_model_under_the_same_loop() -> None:
    """50 steps, to 1e-4: layers of PEFT's in place, and its own PeftModel around the same base."""
    model = adapted()
    twin = peft_twin(model, LORA)
    for name, p in twin.named_parameters():
        p.requires_grad_("lora_" in name)
    wrapped = peft.get_peft_model(byte_llama(), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]))
    narrow = byte_llama()
    ln.attach(narrow, ln.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for path, w in weights(narrow, "default").items():
            theirs = wrapped.get_submodule(f"base_model.model.{path}")
            w.lora_A.copy_(theirs.lora_A["default"].weight)
    settings = config(max_steps=50, learning_rate=5e-3, weight_decay=0.01, gradient_accumulation_steps=2, batch_size=2)
    for mine, other in ((model, twin), (narrow, wrapped)):
        ours, theirs = (ln.train(m, TOKENIZER, PAIRS, settings).losses for m in (mine, other))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert ours[-1] < ours[0] - 0.3
