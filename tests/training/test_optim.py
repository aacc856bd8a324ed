"""Which parameters step, and the learning rate at named steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_nb as ln
from lora_nb.errors import TrainingError
from lora_nb.training.optim import learning_rate, make_optimizer, trainable
from tests.text import byte_llama

LORA = ln.LoraConfig(r=2, lora_alpha=6)


def test_the_whole_model_trains_until_an_adapter_is_attached() -> None:
    model = byte_llama()
    assert len(trainable(model)) == len(list(model.parameters()))
    ln.attach(model, LORA, "one")
    ln.attach(model, LORA, "two")
    ours = ln.parameters(model, "two").values()
    assert {id(p) for p in trainable(model)} == {id(p) for p in ours}
    ln.set_active(model, ["one", "two"])
    assert len(trainable(model)) == 2 * len(ours)


def test_nothing_to_train() -> None:
    model = byte_llama()
    ln.attach(model, LORA)
    ln.set_active(model, [])
    with pytest.raises(TrainingError, match=r"Nothing in the model trains: attach.* or set_active"):
        trainable(model)


def test_the_optimizer_is_adamw_as_configured() -> None:
    model = byte_llama()
    ln.attach(model, LORA)
    optimizer = make_optimizer(model, ln.TrainConfig(learning_rate=3e-3, weight_decay=0.1))
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-3, 0.1, (0.9, 0.999), 1e-8)
    assert {id(p) for p in group["params"]} == {id(p) for p in trainable(model)}


@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "factor"),
    [
        # ten steps, the first of them 0
        ("constant", 0, 0, 1),
        ("constant", 0, 9, 1),
        ("constant", 3, 0, 1 / 4),
        ("constant", 3, 2, 3 / 4),
        ("constant", 3, 3, 1),
        ("linear", 0, 0, 1),
        ("linear", 0, 5, 1 / 2),
        ("linear", 0, 9, 1 / 10),
        ("linear", 4, 1, 2 / 5),
        ("linear", 4, 4, 1),
        ("linear", 4, 7, 1 / 2),
        ("linear", 4, 9, 1 / 6),
        ("cosine", 0, 0, 1),
        ("cosine", 0, 5, 1 / 2),
        ("cosine", 4, 4, 1),
        ("cosine", 4, 7, 1 / 2),
        ("cosine", 4, 9, (1 - math.sqrt(3) / 2) / 2),
        ("linear", 50, 0, 1 / 10),  # a warm-up that is longer than the run rises to the last step
        ("linear", 50, 9, 1),
    ],
)
def test_rate_at_named_steps(schedule: str, warmup: int, step: int, factor: float) -> None:
    config = ln.TrainConfig(learning_rate=0.3, lr_scheduler_type=schedule, warmup_steps=warmup)
    assert learning_rate(config, step, 10) == pytest.approx(0.3 * factor, rel=1e-12)


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(0, 30), st.integers(1, 40))
def test_the_rate_rises_once_then_never_again_and_no_step_is_wasted(schedule: str, warmup: int, total: int) -> None:
    config = ln.TrainConfig(learning_rate=0.3, lr_scheduler_type=schedule, warmup_steps=warmup)
    rates = [learning_rate(config, step, total) for step in range(total)]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(0.3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
