"""A sweep trains every combination; without Ray the trials are tried one by one, and Ray is asked for by name."""

from __future__ import annotations

import sys

import pytest

import lora_nb as ln
from lora_nb.errors import ConfigError, TrainingError
from lora_nb.training.sweep import Sweep, grid, sweep, trial
from tests.text import byte_llama, byte_tokenizer

PAIRS = ln.dataset([(word, word[::-1]) for word in ("to", "and", "from", "under", "beyond", "through")])
CONFIG = ln.TrainConfig(max_steps=3, batch_size=3, seq_len=64, warmup_steps=0)


def loader():
    return byte_llama(), byte_tokenizer()


def test_the_grid_is_every_combination() -> None:
    made = grid({"r": [2, 4], "learning_rate": [1e-3, 2e-3, 3e-3]})
    assert len(made) == 6
    assert made[1] == {"r": 2, "learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("space", "says"),
    [({"rank": [2]}, "sweep over 'rank'.*has such a field"), ({"r": []}, "list of values"), ({"optimizer": "adamw"}, "list of values")],
)
def test_a_space_that_means_nothing_is_refused(space: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sweep(space, PAIRS, PAIRS)


def test_a_trial_is_a_run_with_these_settings() -> None:
    told: list[dict[str, float]] = []
    settings = {"r": 3, "learning_rate": 5e-3}
    lora = ln.LoraConfig(lora_alpha=12)
    found = trial(settings, PAIRS, PAIRS[:2], lora=lora, config=CONFIG, loader=loader, report=told.append)
    assert [t["step"] for t in told] == [1, 2, 3]
    other = trial(settings | {"r": 4}, PAIRS, PAIRS[:2], lora=lora, config=CONFIG, loader=loader)
    assert found != other
    assert found == trial(settings, PAIRS, PAIRS[:2], lora=lora, config=CONFIG, loader=loader)


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TrainingError, match=r"Ray Tune.*pip install 'lora-nb\[distributed\]'"):
        sweep({"r": [2]}, PAIRS, PAIRS)


def test_how_a_sweep_looks() -> None:
    made = Sweep((({"r": 4}, 2.5), ({"r": 2}, 3.0)), (({"r": 900}, "TargetError: too large"),))
    assert made.best == {"r": 4}
    for form in (repr(made), made._repr_html_()):
        for part in ("held-out loss", "2.5", "900", "too large"):
            assert part in form


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_runs_the_trials_and_finds_what_they_find_alone(tmp_path) -> None:
    pytest.importorskip("ray.tune", reason="needs Ray Tune, the extra 'distributed'")
    found = sweep({"learning_rate": [1e-4, 1e-2]}, PAIRS, PAIRS[:2], config=CONFIG, loader=loader, folder=tmp_path)
    assert found.best == {"learning_rate": 1e-2}
    alone = [trial(s, PAIRS, PAIRS[:2], lora=ln.LoraConfig(), config=CONFIG, loader=loader) for s, _ in found.trials]
    assert [loss for _, loss in found.trials] == pytest.approx(alone, rel=1e-4)
