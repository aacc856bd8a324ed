"""The same training under many settings, one process a trial, on Ray Tune (the `distributed` extra)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_nb.attach import attach
from lora_nb.bases import load
from lora_nb.configs import LoraConfig, TrainConfig
from lora_nb.datasets import Dataset
from lora_nb.errors import ConfigError, TrainingError, nearest
from lora_nb.render import html_table, text_table
from lora_nb.training.loop import train
from lora_nb.training.run import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Settings = dict[str, Any]
Report = Callable[[dict[str, float]], None]
THREADS = 1  # of a trial on a CPU: trials side by side, not threads, fill the cores


@dataclass(frozen=True)
class Sweep:
    """Held-out loss by settings, the best first; `failed` has the settings of trials that ended with an error, and its words."""

    trials: tuple[tuple[Settings, float], ...]
    failed: tuple[tuple[Settings, str], ...] = ()

    @property
    def best(self) -> Settings:
        """The settings with the lowest held-out loss."""
        return self.trials[0][0]

    def _header(self) -> list[str]:
        return [*self.best, "held-out loss"]

    def _rows(self) -> list[tuple[Any, ...]]:
        ended = [(*settings.values(), loss) for settings, loss in self.trials]
        return [*ended, *((*settings.values(), said[:60]) for settings, said in self.failed)]

    def __repr__(self) -> str:
        return text_table(self._header(), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._header(), self._rows())


def grid(space: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every combination: `{"r": [4, 8], "learning_rate": [1e-3, 2e-3]}` makes four.

    Raises:
        ConfigError: a name that neither config has, or a name without values.
    """
    known = {f.name for config in (LoraConfig, TrainConfig) for f in fields(config)}
    for name, values in space.items():
        if name not in known:
            raise ConfigError(f"A sweep over {name!r}: neither LoraConfig nor TrainConfig has such a field." + nearest(name, known))
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"A sweep over {name!r} needs a list of values, not {values!r}.")
    return [dict(zip(space, chosen, strict=True)) for chosen in product(*space.values())]


def trial(
    settings: Settings,
    dataset: Dataset,
    eval_dataset: Dataset,
    *,
    lora: LoraConfig,
    config: TrainConfig,
    loader: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    report: Report | None = None,
) -> float:
    """One training run from a fresh base; its held-out loss at the end. `report` hears of each step."""
    lora = replace(lora, **{k: v for k, v in settings.items() if k in {f.name for f in fields(LoraConfig)}})
    config = replace(config, **{k: v for k, v in settings.items() if k in {f.name for f in fields(TrainConfig)}})
    model, tokenizer = loader()
    torch.manual_seed(config.seed)
    attach(model, lora)

    def tell(step: Step) -> None:
        if report:
            report({"step": step.step, "loss": step.loss})

    return train(model, tokenizer, dataset, config, eval_dataset=eval_dataset, callbacks=[tell]).eval_losses[-1][1]


def sweep(
    space: Mapping[str, Sequence[Any]],
    dataset: Dataset,
    eval_dataset: Dataset,
    *,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    loader: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] = load,
    gpus_per_trial: float = 0,
    folder: str | Path | None = None,
) -> Sweep:
    """Train under every combination of `space`, as many at once as there are cores (or GPUs), each in a process of its own.

    Args:
        space: fields of LoraConfig and TrainConfig with the values to try: `{"r": [2, 8], "learning_rate": [1e-3, 5e-3]}`.
        lora, config: everything that is not swept.
        loader: gives base and tokenizer in the trial's process; default: the embedded base.
        gpus_per_trial: a fraction lets several trials share one.
        folder: where Ray keeps its records; default: its own.

    Raises:
        ConfigError: a field that neither config has.
        TrainingError: Ray is not installed, or every trial failed.
    """
    chosen = grid(space)
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise TrainingError("A sweep needs Ray Tune, which is not installed: pip install 'lora-nb[distributed]'.") from error
    lora, config = lora or LoraConfig(), config or TrainConfig()
    if not ray.is_initialized():  # by the caller, who then says what trials see
        ray.init(runtime_env={"env_vars": {"TQDM_DISABLE": "1"}})

    def run(settings: Settings) -> None:
        if not gpus_per_trial:
            torch.set_num_threads(THREADS)
        given = settings["settings"]
        found = trial(given, dataset, eval_dataset, lora=lora, config=config, loader=loader, report=tune.report)
        tune.report({"eval_loss": found})

    tuner = tune.Tuner(
        tune.with_resources(run, {"cpu": THREADS, "gpu": gpus_per_trial}),
        param_space={"settings": tune.grid_search(chosen)},
        run_config=tune.RunConfig(storage_path=str(Path(folder).absolute()) if folder else None, verbose=0),
    )
    results = list(tuner.fit())
    ended = [(r.config["settings"], float(r.metrics["eval_loss"])) for r in results if not r.error and r.metrics]
    failed = [(r.config["settings"], str(r.error).strip().splitlines()[-1]) for r in results if r.error]
    if not ended:
        raise TrainingError(f"Every trial of the sweep failed; the first with: {failed[0][1]}")
    return Sweep(tuple(sorted(ended, key=lambda t: t[1])), tuple(failed))
