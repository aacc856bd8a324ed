"""The search itself: from a run to its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_nb.attach import acting, adapters, only_name, set_active, weights
from lora_nb.configs import TrainConfig
from lora_nb.configs.checks import is_count, is_number
from lora_nb.datasets import Dataset
from lora_nb.errors import ConfigError, RankError
from lora_nb.layers.lora import LoraWeights
from lora_nb.rank.budget import allocate, budget
from lora_nb.rank.choice import Losses, as_good, compared, interval, ladder, scores, search
from lora_nb.rank.directions import Directions, directions, rewritten
from lora_nb.rank.held_out import of_blocks, of_function
from lora_nb.rank.report import RankReport, shrink
from lora_nb.training.loop import Run, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORWARDS = 2  # that an optimizer step costs for each token, the base being frozen: one on the way there, one back
MOST_TOKENS = 1 << 16  # held-out tokens for each rank where nothing says what the run has cost
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the parameters of one rank for all, tried for ranks by module
EQUAL = 5e-4  # of the loss: no difference
ALONE: dict[str, Any] = {
    "eval_every": None,
    "early_stopping_patience": None,
    "checkpoint_dir": None,
    "checkpoint_every": None,
    "resume": False,
    "log_file": None,
    "tensorboard_dir": None,
}


def find_rank(
    run: Run | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_dataset: Dataset | None = None,
    losses: Callable[[nn.Module], Tensor] | None = None,
    name: str | None = None,
    tolerance: float = 0.005,
    cost: float = 0.05,
    polish: int = 0,
) -> RankReport:
    """The smallest rank that would have done, from one run at a rank that is surely enough (32 or 64). The adapter stays as it is.

    Args:
        run: of `train`; what is left out below is taken from it.
        model, tokenizer, eval_dataset: where the adapter is, and data that it was not trained on.
        losses: instead of the last two, for models of other kinds: model → the held-out loss of each example, (n,).
        name: the adapter. Default: that of the run, or the active one.
        tolerance: a loss that is above the lowest by no more than this share of it is as good; so is one within a standard error.
        cost: how much of the run's time it may take, about; decides how many of the held-out examples are used.
        polish: optimizer steps to train the cut adapter on, as a new one beside the old; 5 to 10 % of the run's are plenty.

    Raises:
        RankError: something is missing, or too little held-out data.
        AdapterError: an adapter that is more than sums of B A.
    """
    start = time.perf_counter()
    _check(tolerance, cost, polish)
    model = _given("model", model, run)
    assert model is not None
    name = _adapter(model, name, run)
    trainable = (_given("tokenizer", tokenizer, run), _given("dataset", None, run)) if polish else None
    parts = list(weights(model, name).values())
    most = max((part.r for part in parts), default=0)
    if losses is None:
        data, reader = _given("eval_dataset", eval_dataset, run), _given("tokenizer", tokenizer, run)
        held = of_blocks(
            model, reader, data.encode(reader, run.config.seq_len if run else 256), _tokens(run, cost, most, _apart(model, parts))
        )
    else:
        held = of_function(model, losses)
    with _evaluating(model, name):
        found = directions(model, name, held)
        with rewritten(model, name, found) as cut:

            def at(ranks: Mapping[str, int]) -> Losses:
                cut(ranks)
                return held()

            bare = at(dict.fromkeys(found, 0))
            rank, table = search(lambda r: at({path: min(r, d.rank) for path, d in found.items()}), most, tolerance)
            ranks, saving, loss = _by_module(found, rank, table[rank], at)
    taken = time.perf_counter() - start
    report = RankReport(
        name,
        rank,
        interval(table, tolerance, rank),
        scores(table),
        ranks,
        saving,
        loss,
        tolerance,
        len(table[rank].tokens),
        taken,
        taken / run.seconds if run and run.seconds else None,
        found,
        bare.mean,
        _notes(rank, most, as_good(compared(bare, table[rank]), table[rank].mean, tolerance)),
    )
    return report if trainable is None or run is None else _polished(report, model, run.config, trainable, steps=polish, held=held)


def _check(tolerance: float, cost: float, polish: int) -> None:
    if not is_number(tolerance) or not 0 <= tolerance < 1:
        raise ConfigError(f"find_rank(tolerance={tolerance!r}): it is a share of the loss, from 0 to below 1, such as 0.005.")
    if not is_number(cost) or not cost > 0:
        raise ConfigError(f"find_rank(cost={cost!r}): it is a share of the run's time above 0, such as 0.05.")
    if not is_count(polish, 0):
        raise ConfigError(f"find_rank(polish={polish!r}): it is a number of optimizer steps, 0 for none.")


def _adapter(model: nn.Module, name: str | None, run: Run | None) -> str:
    """The adapter to look at."""
    trained = run.adapter if run else None
    if name is None and trained is not None and trained not in adapters(model).reports and ", " in trained:
        raise RankError(f"The run trained several adapters ({trained}), each of which has a rank: say which one with name=….")
    return only_name(model, name or trained)


def _given(what: str, given: Any, run: Run | None) -> Any:
    """What was given, or else what the run has kept."""
    if run is not None and not isinstance(run, Run):
        raise RankError(
            f"find_rank(run) takes what train() gave, not a {type(run).__name__}; without a run give model=…, tokenizer=…, eval_dataset=…."
        )
    found = given if given is not None else getattr(run.origin, what) if run and run.origin else None
    if found is None:
        why = f"the run has no {what}, or not any more" if run else "there is no run to take it from"
        raise RankError(f"find_rank needs {what}=…, as {why}.")
    return found


def _tokens(run: Run | None, cost: float, most: int, apart: float) -> float:
    """Held-out tokens for each evaluation, so that all of them and `apart` tokens more take the share `cost` of the run."""
    evaluations = 2 + len(ladder(most)) + 4 + 3  # the directions, the base, the ladder, the gap below the choice, ranks by module
    return max(0.0, cost * FORWARDS * run.tokens - apart) / evaluations if run and run.tokens else MOST_TOKENS


def _apart(model: nn.Module, parts: Sequence[LoraWeights]) -> float:
    """Tokens whose forward takes as long as taking the update apart: in 64 bits, so twice what these many multiply-adds would."""
    sizes = [(part.r, len(part.lora_B), part.lora_A[0].numel()) for part in parts]
    work = sum(15 * r**3 + r * r * (4 * out + fan_in) for r, out, fan_in in sizes)  # three factorizations; products with A and B
    adapted = sum(out * fan_in for _, out, fan_in in sizes)  # a base in four bits holds fewer numbers than it multiplies by
    return 2 * work / max(1, adapted, sum(p.numel() for p in model.parameters()))


def _by_module(
    found: Mapping[str, Directions], rank: int, one: Losses, at: Callable[[Mapping[str, int]], Losses]
) -> tuple[dict[str, int], float, float]:
    """Ranks by module with fewer parameters and no higher loss than one rank for all has; the share saved; the loss."""
    ranks, saving, loss = {path: min(rank, d.rank) for path, d in found.items()}, 0.0, one.mean
    whole = budget(found, rank)
    for share in SHARES:
        tried = allocate(found, int(share * whole))
        losses = at(tried)
        if not as_good(compared(losses, one), one.mean, EQUAL):
            break
        ranks, loss = tried, losses.mean
        saving = 1 - sum(found[path].cost * r for path, r in tried.items()) / whole
    return ranks, saving, loss


def _polished(
    report: RankReport, model: nn.Module, config: TrainConfig, data: tuple[Any, Dataset], *, steps: int, held: Callable[[], Losses]
) -> RankReport:
    """Cut for good, and trained on for some steps from half of the run's rate."""
    before = adapters(model).active
    made = shrink(model, report)
    rate = config.learning_rate / 2
    train(model, *data, replace(config, max_steps=steps, num_train_epochs=None, learning_rate=rate, warmup_steps=0, **ALONE))
    with torch.no_grad():
        loss = held().mean
    set_active(model, before)
    return replace(report, adapter=made.name, polished=loss)


def _notes(rank: int, most: int, idle: bool) -> tuple[str, ...]:
    more = f"This is the rank of the run itself, so more might do better still: train once more with a rank above {most}."
    nothing = "The base without the adapter is as good on these data, so they say nothing of a rank."
    return (nothing,) if idle else (more,) if rank == most else ()


@contextmanager
def _evaluating(model: nn.Module, name: str) -> Iterator[None]:
    """Only this adapter acts, without dropout and gradients; afterwards all is as before."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), acting(model, [name]):
            yield
    finally:
        for m, training in modes.items():
            m.training = training
