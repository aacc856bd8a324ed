"""The loop against a plain one with PEFT's layers, and what it promises about the base, seeds, interrupts and failures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_nb as ln
from lora_nb.attach import weights
from lora_nb.bases import base_parameters
from lora_nb.blocks import IGNORE, Block, collate, pack
from lora_nb.errors import DatasetError, TrainingError
from lora_nb.training import loop
from lora_nb.training.sampler import Sampler, order, total_steps
from tests.models import fill, peft_twin
from tests.text import PAD, PAIRS, byte_llama, byte_tokenizer
from tests.training.stopping import interrupt, stop_at

TOKENIZER = byte_tokenizer()
LORA = ln.LoraConfig(r=4, lora_alpha=12)
quick = settings(max_examples=60, deadline=None, database=None)


def config(**changes) -> ln.TrainConfig:
    return ln.TrainConfig(**{"max_steps": 3, "batch_size": 4, "seq_len": 64, "warmup_steps": 0} | changes)


def adapted(lora: ln.LoraConfig = LORA, *, seed: int = 0) -> nn.Module:
    model = byte_llama()
    torch.manual_seed(seed)
    ln.attach(model, lora)
    return model


def train(model: nn.Module, *callbacks, **changes) -> ln.Run:
    return ln.train(model, TOKENIZER, PAIRS, config(**changes), callbacks=callbacks)


def work_on(model: nn.Module, **changes) -> loop.Work:
    return loop._prepare(model, PAIRS.encode(TOKENIZER, 64), PAD, config(**changes))


def copied(model: nn.Module, name: str | None = None) -> dict[str, torch.Tensor]:
    return {path: p.detach().clone() for path, p in ln.parameters(model, name).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def digest(model: nn.Module) -> str:
    """Every bit of the base."""
    sha = hashlib.sha256()
    for name, p in sorted(base_parameters(model).items()):
        sha.update(name.encode() + p.detach().numpy().tobytes())
    return sha.hexdigest()


# ---- what a step is --------------------------------------------------------------------------------------------------


def test_the_loss_curve_is_that_of_a_plain_loop_with_peft() -> None:
    """PEFT's layers, transformers' loss, PyTorch's AdamW and clipping, the rate written out: 30 steps, loss by loss."""
    model = adapted()
    twin = peft_twin(model, LORA).train()
    train_config = config(max_steps=30, learning_rate=5e-3, warmup_steps=5, weight_decay=0.1, max_grad_norm=0.5, seed=3)
    forwards = Sampler(PAIRS.encode(TOKENIZER, 64), train_config, PAD)

    trained = [p.requires_grad_("lora_" in name) for name, p in twin.named_parameters() if "lora_" in name]
    for name, p in twin.named_parameters():
        p.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.1)
    losses, norms = [], []
    for step in range(30):
        ids, labels, *_ = forwards.forward(step)
        loss = twin(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.param_groups[0]["lr"] = 5e-3 * ((step + 1) / 6 if step < 5 else (30 - step) / 25)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    ours = list(ln.steps(model, TOKENIZER, PAIRS, train_config))
    assert [s.loss for s in ours] == pytest.approx(losses, abs=1e-4)
    assert [s.grad_norm for s in ours] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.5  # clipping was of consequence
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_make_the_gradient_of_one_batch(size: int) -> None:
    """By tokens, not by rows: the rows have from 4 to 40 labels."""
    blocks = PAIRS.encode(TOKENIZER, 64)

    def gradients(batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
        model = adapted()
        fill(model)
        micro = [collate(blocks[i : i + batch_size], PAD) for i in range(0, len(blocks), batch_size)]
        loss, _ = loop._accumulate(work_on(model), micro, 0)
        return loss, {k: p.grad.clone() for k, p in ln.parameters(model).items()}

    (loss, whole), (loss_by_parts, parts) = gradients(len(blocks)), gradients(size)
    assert loss_by_parts == pytest.approx(loss, abs=1e-5)
    for key, grad in whole.items():
        torch.testing.assert_close(parts[key], grad, rtol=1e-4, atol=1e-6)


def test_accumulated_steps_are_the_steps_of_a_larger_batch() -> None:
    """Ten pairs, all of them in each step: five forwards of two, or one of ten."""
    after = []
    for batch_size, forwards in ((10, 1), (2, 5)):
        model = adapted()
        fill(model)
        run = train(model, batch_size=batch_size, gradient_accumulation_steps=forwards, learning_rate=1e-4)
        after.append((run.losses, copied(model)))
    assert after[0][0] == pytest.approx(after[1][0], abs=1e-5)
    for key, p in after[0][1].items():
        torch.testing.assert_close(after[1][1][key], p, rtol=0, atol=1e-6)


def test_clipping_reports_the_norm_and_limits_it() -> None:
    norms = {}
    for limit in (None, 1e9, 1e-3):
        model = adapted()
        blocks = PAIRS.encode(TOKENIZER, 64)
        work = work_on(model, max_grad_norm=limit)
        loop._accumulate(work, [collate(blocks[:4], PAD)], 0)
        reported = loop._clip(work, list(ln.parameters(model).values()))
        left = torch.cat([p.grad.flatten() for p in ln.parameters(model).values()]).norm()
        norms[limit] = reported, float(left)
    (free, free_left), (loose, loose_left), (tight, tight_left) = norms.values()
    assert free == loose == tight > 0.01
    assert free_left == loose_left == pytest.approx(free, rel=1e-5)
    assert tight_left == pytest.approx(1e-3, rel=1e-2)


def test_in_the_first_step_only_b_learns_and_in_the_second_a_too() -> None:
    model = adapted()
    start = copied(model)
    turns = ln.steps(model, TOKENIZER, PAIRS, config())
    next(turns)
    first = copied(model)
    next(turns)
    for key, p in copied(model).items():
        assert torch.equal(first[key], start[key]) == ("lora_A" in key)
        assert not torch.equal(p, first[key])
    turns.close()


def test_gradients_from_before_the_run_do_not_count() -> None:
    clean, stale = adapted(), adapted()
    for p in ln.parameters(stale).values():
        p.grad = torch.ones_like(p)
    assert train(clean).losses == train(stale).losses
    assert same(copied(clean), copied(stale))


def test_steps_say_what_happened() -> None:
    turns = ln.steps(adapted(), TOKENIZER, PAIRS, config(max_steps=4, learning_rate=0.01, gradient_accumulation_steps=2))
    seen = list(turns)
    assert [(s.step, s.total) for s in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [s.learning_rate for s in seen] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert all(s.grad_norm > 0 and s.seconds > 0 and s.tokens > 0 for s in seen)


# ---- what trains, and what does not ----------------------------------------------------------------------------------


def test_the_base_is_unchanged_to_the_bit_and_only_active_adapters_move() -> None:
    model = byte_llama()
    before = digest(model)
    for name in ("idle", "one", "two"):
        ln.attach(model, LORA, name)
        fill(model, name)
    ln.set_active(model, ["one", "two"])
    start = {name: copied(model, name) for name in ("idle", "one", "two")}
    run = train(model, weight_decay=0.1)
    assert digest(model) == before
    assert same(copied(model, "idle"), start["idle"])
    for name in ("one", "two"):
        after = copied(model, name)
        assert not any(torch.equal(after[key], start[name][key]) for key in after)
    assert run.adapter == "one, two"
    ln.detach(model)
    assert digest(model) == before


def test_full_fine_tuning_without_an_adapter() -> None:
    model = byte_llama()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = train(model, max_steps=8, learning_rate=1e-2)
    assert run.adapter is None
    assert "the whole model" in repr(run)
    assert run.losses[-1] < run.losses[0]
    assert not any(torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_training_learns() -> None:
    model = adapted()
    run = ln.train(model, TOKENIZER, PAIRS, config(max_steps=40, learning_rate=1e-2), eval_dataset=PAIRS)
    (_, before), (_, after) = run.eval_losses
    assert after < before - 1
    assert run.losses[-1] < run.losses[0] - 1


def test_nothing_to_train() -> None:
    model = adapted()
    ln.set_active(model, [])
    evaluated = []
    model.register_forward_hook(lambda *_: evaluated.append(1))
    with pytest.raises(TrainingError, match="Nothing in the model trains"):
        ln.train(model, TOKENIZER, PAIRS, config(), eval_dataset=PAIRS)
    assert evaluated == []  # said before the first evaluation


def test_a_loss_that_reaches_no_adapter_is_refused() -> None:
    light = adapted()
    light.activation_checkpointing_enable()  # makes the embeddings' output ask for a gradient, so that the loss has one
    for model in (adapted(), light):
        with ln.disabled(model), pytest.raises(TrainingError, match=r"No gradient reaches what trains.*disabled\(model\)"):
            train(model)
        with torch.no_grad(), pytest.raises(TrainingError, match=r"No gradient reaches what trains.*no_grad\(\)"):
            train(model)
        assert len(train(model).losses) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_the_model_itself_drops_no_gradient(reentrant: bool) -> None:
    plain, light = adapted(), adapted()
    light.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert train(light).losses == pytest.approx(train(plain).losses, abs=1e-6)
    assert not same(copied(light), copied(adapted()))


# ---- seeds -----------------------------------------------------------------------------------------------------------

DROPPING = ln.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.3)


def test_the_same_seed_gives_the_same_adapter_to_the_bit() -> None:
    runs = {}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        model = adapted(DROPPING)
        torch.manual_seed(hash(name) % 1000)  # what was drawn before does not matter
        runs[name] = train(model, seed=seed).losses, copied(model)
    assert runs["first"][0] == runs["again"][0]
    assert same(runs["first"][1], runs["again"][1])
    assert not same(runs["first"][1], runs["other"][1])


def test_looking_in_between_changes_nothing() -> None:
    """Evaluating and sampling, which a callback may do, draw no numbers from the dropout's stream and switch no mode."""
    blind, watched = adapted(DROPPING), adapted(DROPPING)

    def look(_: ln.Step) -> None:
        ln.generate(watched, TOKENIZER, "to =>", max_new_tokens=2, temperature=1.0)
        watched.eval()

    losses = train(blind).losses
    run = ln.train(watched, TOKENIZER, PAIRS, config(eval_every=1), eval_dataset=PAIRS, callbacks=[look])
    assert run.losses == losses
    assert same(copied(blind), copied(watched))


def test_dropout_is_off_after_training_and_on_during() -> None:
    model = adapted(DROPPING)
    modes = []
    train(model, lambda _: modes.append(model.training))
    assert modes == [True] * 3
    assert {m.training for m in model.modules()} == {False}


# ---- how long a run is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps", "stopped_by"),
    [
        # ten pairs in batches of four: three forwards an epoch
        ({"max_steps": 2}, 2, "max_steps"),
        ({"max_steps": 50, "num_train_epochs": 2}, 6, "num_train_epochs"),
        ({"max_steps": 50, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, 3, "num_train_epochs"),
        ({"max_steps": 50, "num_train_epochs": 1, "gradient_accumulation_steps": 2}, 2, "num_train_epochs"),
        ({"max_steps": 50, "num_train_epochs": 0.5}, 2, "num_train_epochs"),
        ({"max_steps": 50, "num_train_epochs": 0.01}, 1, "num_train_epochs"),
        ({"max_steps": 2, "num_train_epochs": 5}, 2, "max_steps"),
    ],
)
def test_length_of_a_run(changes: dict[str, float], steps: int, stopped_by: str) -> None:
    run = train(adapted(), **changes)
    assert (run.steps, run.stopped_by) == (steps, stopped_by)


@quick
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 50), st.integers(1, 60))
def test_epochs_are_counted_without_rounding_errors(blocks: int, batch_size: int, forwards: int, epochs: int) -> None:
    chosen = config(max_steps=10**9, num_train_epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=forwards)
    assert total_steps(blocks, chosen) == math.ceil(Fraction(math.ceil(Fraction(blocks, batch_size)) * epochs, forwards))


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=90), st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_has_every_block_once(lengths: list[int], batch_size: int, seed: int) -> None:
    blocks = [Block([0] * n, [0] * n) for n in lengths]
    for epoch in range(3):
        assert sorted(order(blocks, config(batch_size=batch_size, seed=seed), epoch)) == list(range(len(blocks)))


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    blocks = [Block([0] * n, [0] * n) for n in range(1, 41)]
    orders = [order(blocks, config(seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert orders[0] == order(blocks, config(seed=0), 0)


def test_rows_of_like_length_share_a_batch() -> None:
    blocks = [Block([0] * n, [0] * n) for n in [*range(1, 33)] * 4]
    chosen = config(batch_size=4)
    rows = order(blocks, chosen, 0)
    lengths = [[len(blocks[j].input_ids) for j in rows[i : i + 4]] for i in range(0, 128, 4)]
    padding = sum(max(row) * 4 - sum(row) for row in lengths)
    assert padding < 0.1 * sum(map(sum, lengths))  # of random batches more than half would be padding
    assert lengths != sorted(lengths)


# ---- stopping --------------------------------------------------------------------------------------------------------


def after_two_steps() -> dict[str, torch.Tensor]:
    model = adapted()
    turns = ln.steps(model, TOKENIZER, PAIRS, config(max_steps=9))
    next(turns), next(turns)
    turns.close()
    return copied(model)


@pytest.mark.parametrize(("answer", "stopped_by"), [(interrupt, "interrupt"), (lambda: True, "callback")])
def test_stopping_early_keeps_what_was_learnt(answer: Callable[[], object], stopped_by: str) -> None:
    model, seen = adapted(), []
    run = train(model, stop_at(2, answer), seen.append, max_steps=9)
    assert (run.steps, run.stopped_by) == (2, stopped_by)
    assert len(seen) == (2 if stopped_by == "callback" else 1)  # the other callback has its turn too
    assert same(copied(model), after_two_steps())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert stopped_by in repr(run)


def test_an_interrupt_within_a_step_keeps_the_steps_before() -> None:
    model = adapted()
    calls = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == 6:  # the second of two forwards of the third step
            raise KeyboardInterrupt

    handle = model.register_forward_hook(hook)
    run = train(model, max_steps=9, gradient_accumulation_steps=2)
    handle.remove()
    assert (run.steps, run.stopped_by) == (2, "interrupt")
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("when", [0, 3])
def test_an_interrupt_during_evaluation_still_gives_the_run(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> ln.Evaluation:
        if len(steps) == when:
            raise KeyboardInterrupt
        return ln.Evaluation(1.0, 1.0, 1.0, 0.0, 0.0, 1, 1)

    steps: list[ln.Step] = []
    monkeypatch.setattr(loop, "evaluate_blocks", evaluate)
    run = ln.train(adapted(), TOKENIZER, PAIRS, config(), eval_dataset=PAIRS, callbacks=[steps.append])
    assert (run.steps, run.stopped_by) == (when, "interrupt")


def test_evaluations_are_at_the_start_every_so_often_and_at_the_end_once_each() -> None:
    def at(**changes) -> list[int]:
        callbacks = changes.pop("callbacks", ())
        run = ln.train(adapted(), TOKENIZER, PAIRS, config(**changes), eval_dataset=PAIRS[:2], callbacks=callbacks)
        assert all(math.isfinite(loss) for _, loss in run.eval_losses)
        return [step for step, _ in run.eval_losses]

    assert at(max_steps=5, eval_every=2) == [0, 2, 4, 5]
    assert at(max_steps=4, eval_every=2) == [0, 2, 4]
    assert at(max_steps=3) == [0, 3]
    assert at(max_steps=5, eval_every=2, callbacks=[stop_at(2, lambda: True)]) == [0, 2]
    assert at(max_steps=5, eval_every=2, callbacks=[stop_at(3, interrupt)]) == [0, 2]
    assert train(adapted(), eval_every=1).eval_losses == []


def test_steps_closed_midway_leave_a_model_to_use() -> None:
    model = adapted()
    turns = ln.steps(model, TOKENIZER, PAIRS, config(max_steps=9))
    next(turns)
    assert model.training
    turns.close()
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(ln.generate(model, TOKENIZER, "to =>", max_new_tokens=2), str)
    assert len(train(model).losses) == 3


# ---- failing ---------------------------------------------------------------------------------------------------------


def test_a_poisoned_base_is_noticed_before_it_reaches_the_adapter() -> None:
    model = adapted()
    start = copied(model)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = math.nan
    with pytest.raises(TrainingError, match=r"Step 1 has loss nan .* parameters of step 0 are kept.*attach anew"):
        train(model)
    assert same(copied(model), start)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_rate_that_blows_up_leaves_finite_parameters() -> None:
    model = adapted()
    before: list[dict[str, torch.Tensor]] = []
    with pytest.raises(TrainingError, match=r"learning rate that is too high \(here 1e\+25\)"):
        train(model, lambda _: before.append(copied(model)), learning_rate=1e25, lr_scheduler_type="constant", max_steps=20)
    assert before
    assert same(copied(model), before[-1])
    assert all(bool(p.isfinite().all()) for p in copied(model).values())


@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_gradient_that_overflows_under_a_finite_loss_is_noticed(limit: float | None) -> None:
    model = adapted()
    start = copied(model)
    next(iter(weights(model, "default").values())).lora_B.register_hook(lambda grad: torch.full_like(grad, math.inf))
    with pytest.raises(TrainingError, match="gradient norm inf: the parameters of step 0 are kept"):
        train(model, max_grad_norm=limit)
    assert same(copied(model), start)


def test_data_that_cannot_be_used() -> None:
    with pytest.raises(DatasetError, match="less than one block"):
        ln.train(adapted(), TOKENIZER, ln.dataset(["short"]), config())


# ---- how it looks ----------------------------------------------------------------------------------------------------


def test_what_a_run_reports() -> None:
    run = ln.train(adapted(), TOKENIZER, PAIRS, config(), eval_dataset=PAIRS)
    assert (run.adapter, run.config, run.steps) == ("default", config(), 3)
    assert run.tokens == sum(len(ids) * len(ids[0]) for ids, _ in batches_of(config()))
    assert run.tokens_per_second == pytest.approx(run.tokens / run.seconds)
    assert run.peak_memory > 50e6
    text, page = repr(run), run._repr_html_()
    for form in (text, page):
        for part in (
            "adapter",
            "3, stopped by max_steps",
            f"{run.losses[-1]:.3f}",
            "tokens/s",
            "MiB" if run.peak_memory < 2**30 else "GiB",
        ):
            assert part in form
        assert "held-out loss" in form
    assert '<svg role="img"' in page
    assert "&#x27;default&#x27;" in page


def batches_of(chosen: ln.TrainConfig) -> list[tuple[list, list]]:
    forwards = Sampler(PAIRS.encode(TOKENIZER, chosen.seq_len), chosen, PAD)
    return [(batch.input_ids.tolist(), batch.labels.tolist()) for batch in map(forwards.forward, range(chosen.max_steps))]


def test_a_run_of_no_step_shows_itself_too() -> None:
    run = ln.Run(None, ln.TrainConfig(), stopped_by="interrupt")
    assert "no step was made" in repr(run)
    assert "<svg" not in run._repr_html_()
    assert run.tokens_per_second == 0


def test_how_a_step_looks() -> None:
    step = ln.Step(2, 9, 1.25, 0.004, 0.5, 1234, 0.75)
    assert "step=2, total=9, loss=1.25" in repr(step)
    for part in ("2 of 9", "1.25", "0.004", "0.5", "1,234", "0.75", "<table>"):
        assert part in step._repr_html_()


def test_ignored_labels_count_for_nothing() -> None:
    """A batch without one label, which a user's own blocks may have, neither divides by zero nor moves anything."""
    model = adapted()
    start = copied(model)
    run = ln.train(model, TOKENIZER, ln.dataset([Block([1, 5, 6], [IGNORE] * 3)]), config())
    assert run.losses == [0.0] * 3
    assert same(copied(model), start)


def test_compiled_code_meets_one_length_when_packed_and_a_few_when_not() -> None:
    """Else every step is compiled anew, a minute each; what is learnt from does not change."""
    blocks = PAIRS.encode(TOKENIZER, 64)
    for chosen, allowed in (({"packing": True, "seq_len": 64}, {64}), ({"seq_len": 48}, {8, 16, 32, 48})):
        plain, compiled = (config(max_steps=8, batch_size=4, compile=c, **chosen) for c in (False, True))
        rows = [b for b in (pack(blocks, 64) if plain.packing else blocks) if len(b.input_ids) <= plain.seq_len]
        ours, theirs = (Sampler(rows, c, PAD) for c in (compiled, plain))
        for number in range(8):
            padded, short = ours.forward(number), theirs.forward(number)
            width = short.input_ids.shape[1]
            assert padded.input_ids.shape[1] in allowed
            assert torch.equal(padded.input_ids[:, :width], short.input_ids)
            assert torch.equal(padded.labels[:, :width], short.labels)
            assert (padded.labels[:, width:] == IGNORE).all()
