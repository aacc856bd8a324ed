"""Training beside serving: the texts are those of serving alone, what is learnt is that of training alone."""

from __future__ import annotations

import pytest
import torch

import lora_nb as ln
from lora_nb.errors import AdapterError, ConfigError, ServingError, TrainingError
from tests.models import fill
from tests.text import byte_llama, byte_tokenizer

TOKENIZER = byte_tokenizer()
PAIRS = ln.dataset([(f"say {word}", f"{word} it is") for word in ("one", "two", "three", "four", "five", "six")])
CONFIG = ln.TrainConfig(max_steps=6, batch_size=3, seq_len=48, learning_rate=1e-2, max_grad_norm=1.0, seed=4)


def carried() -> torch.nn.Module:
    """A model with one adapter to serve and one to train."""
    model = byte_llama()
    for i, name in enumerate(("served", "trained")):
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12), name)
        fill(model, name, seed=i)
    return model


def alone(rows_at_once: int) -> dict[str, torch.Tensor]:
    """The same training on a server without requests."""
    model = carried()
    with ln.AdapterServer(model, TOKENIZER) as server:
        server.train("trained", PAIRS, CONFIG, rows_at_once=rows_at_once).result(60)
    return {n: p.detach() for n, p in ln.parameters(model, "trained").items()}


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
def test_both_are_what_they_are_alone(rows_at_once: int) -> None:
    model = carried()
    expected = ln.generate(model, TOKENIZER, ["a", "xyz"], adapter=["served", None], max_new_tokens=40)
    with ln.AdapterServer(model, TOKENIZER) as server:
        training = server.train("trained", PAIRS, CONFIG, rows_at_once=rows_at_once)
        texts = server.generate(["a", "xyz"], ["served", None], max_new_tokens=40)
        run = training.result(60)
        steps = server.figures().steps
    assert [t.strip() for t in texts] == expected
    assert run.steps == 6
    assert run.stopped_by == "max_steps"
    assert run.losses[-1] < run.losses[0]
    assert steps >= 6 * 3 // rows_at_once
    for name, p in alone(rows_at_once).items():
        assert torch.allclose(ln.parameters(model, "trained")[name], p, atol=1e-4), name


def test_what_is_learnt_is_what_a_plain_loop_learns() -> None:
    """AdamW over the mean loss of the labelled tokens, on transformers' own loss for each row."""
    model = carried()
    with ln.AdapterServer(model, TOKENIZER) as server:
        run = server.train("trained", PAIRS, CONFIG, rows_at_once=2).result(60)
        order = server.scheduler._training
    plain = carried()
    blocks = PAIRS.encode(TOKENIZER, 48)
    optimizer = torch.optim.AdamW(ln.parameters(plain).values(), lr=1e-2, weight_decay=CONFIG.weight_decay)
    steps = order._steps()
    for step in range(6):
        rows = next(steps)
        assert all(row in blocks for row in rows)
        count = sum(sum(label != -100 for label in row.labels[1:]) for row in rows)
        loss = 0.0
        for row in rows:
            logits = plain(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=-100, reduction="sum") / count
        loss.backward()
        assert float(loss.detach()) == pytest.approx(run.losses[step], rel=1e-4)
        torch.nn.utils.clip_grad_norm_(ln.parameters(plain).values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = ln.training.optim.learning_rate(CONFIG, step, 6)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in ln.parameters(plain, "trained").items():
        assert torch.allclose(ln.parameters(model, "trained")[name], p, atol=1e-4), name


def test_it_stops_when_asked_and_when_it_breaks() -> None:
    model = carried()
    with ln.AdapterServer(model, TOKENIZER) as server:
        with pytest.raises(AdapterError, match="cannot train here"):
            server.train("other", PAIRS)
        for setting in ({"packing": True}, {"precision": "bf16"}, {"checkpoint_dir": "x"}):
            with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.*has no place in training beside serving"):
                server.train("trained", PAIRS, ln.TrainConfig(**setting))
        training = server.train("trained", PAIRS, ln.TrainConfig(max_steps=10_000, batch_size=2, seq_len=48))
        with pytest.raises(ServingError, match="trains already"):
            server.train("trained", PAIRS, CONFIG)
        with pytest.raises(TimeoutError, match="stop"):
            training.result(0.01)
        training.stop()
        assert training.result(20).stopped_by == "callback"
        broken = server.train(
            "trained", PAIRS, ln.TrainConfig(max_steps=50, batch_size=2, seq_len=48, learning_rate=1e30, max_grad_norm=None)
        )
        with pytest.raises(TrainingError, match="learning rate that is too high"):
            broken.result(20)
        assert len(server.generate(["a"], "served", max_new_tokens=3)) == 1
        last = server.train("trained", PAIRS, ln.TrainConfig(max_steps=10_000, batch_size=2, seq_len=48))
    assert last.result(0).stopped_by == "interrupt"


@pytest.mark.parametrize(
    ("setting", "steps"), [({"num_train_epochs": 2}, 4), ({"num_train_epochs": 2, "max_steps": 3}, 3), ({"max_steps": 1}, 1)]
)
def test_how_many_steps(setting: dict, steps: int) -> None:
    with ln.AdapterServer(carried(), TOKENIZER) as server:
        config = ln.TrainConfig(batch_size=3, seq_len=48, loraplus_lr_ratio=4.0, **setting)
        assert server.train("trained", PAIRS, config, rows_at_once=3).result(20).steps == steps
