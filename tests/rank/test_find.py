"""`find_rank` on updates whose rank is known, and what it leaves behind."""

import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_nb.attach import adapters, attach, parameters, set_active, weights
from lora_nb.blocks import IGNORE, Block
from lora_nb.checkpoint import load_adapter, save
from lora_nb.configs import LoraConfig, TrainConfig
from lora_nb.datasets import dataset
from lora_nb.errors import AdapterError, ConfigError, RankError
from lora_nb.rank import find_rank, shrink
from lora_nb.rank.held_out import of_blocks
from lora_nb.training.loop import train
from tests.models import fill, tiny_llama, token_ids

WIDTH, MOST = 48, 24


def taught(rank: int, noise: float, seed: int = 0) -> tuple[nn.Module, object]:
    """A linear layer trained at rank 24 on y = (W + ΔW) x + noise, and the held-out losses; noise is over the update's power."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5000, WIDTH, generator=g)
    delta = torch.randn(WIDTH, rank, generator=g) @ torch.randn(rank, WIDTH, generator=g) / rank**0.5 / WIDTH**0.5
    y = x @ delta.T
    y += noise**0.5 * y.std() * torch.randn(y.shape, generator=g)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    nn.init.zeros_(model[0].weight)
    attach(model, LoraConfig(r=MOST, lora_alpha=36, target_modules=["0"]))
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=1e-2, weight_decay=0)
    for step in range(250):
        i = torch.randint(4000, (256,), generator=g)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 250)
        (model(x[i]) - y[i]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, lambda m: (m(x[4000:]) - y[4000:]).square().mean(1)


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("rank", [2, 5, 12])
def test_a_planted_rank_is_found(rank, noise) -> None:
    model, losses = taught(rank, noise)
    report = find_rank(model=model, losses=losses)
    assert abs(report.rank - rank) <= rank / 4
    assert report.interval[0] <= report.rank <= report.interval[1]
    assert report.scores[report.rank].loss < report.scores[MOST].loss  # what is cut off was noise
    assert report.base_loss > report.scores[MOST].loss
    assert not report.notes


def texts() -> tuple[object, object]:
    rows = [Block(ids, ids) for ids in token_ids(60, 16).tolist()]
    return dataset(rows[:40]), dataset(rows[40:])


@pytest.fixture
def trained():
    from tests.text import byte_tokenizer  # any with a padding token

    model, (data, held) = tiny_llama(), texts()
    attach(model, LoraConfig(r=6, lora_alpha=9, lora_dropout=0.1))
    run = train(model, byte_tokenizer(), data, TrainConfig(max_steps=12, seq_len=16, learning_rate=1e-2), eval_dataset=held)
    return model, run


def test_a_run_has_all_that_is_needed_and_the_model_stays_as_it_is(trained) -> None:
    model, run = trained
    attach(model, LoraConfig(r=2, lora_alpha=3), "other")
    fill(model, "other")
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    report = find_rank(run, cost=1e6)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert adapters(model).active == ("other",)
    assert report.name == "default"
    assert list(report.scores) == sorted(report.scores)
    assert max(report.scores) == 6
    assert report.scores[6].loss == pytest.approx(run.eval_losses[-1][1], abs=1e-5)  # uncut, without the other adapter, without dropout
    assert report.share > 0
    assert f"rank {report.rank} is enough" in repr(report)
    assert "chosen" in report._repr_html_()


def test_ranks_of_their_own_save_parameters_at_no_higher_loss() -> None:
    """Updates of rank 1 in all layers but one: with one rank for all these carry what they do not need."""
    model = tiny_llama()
    attach(model, LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj"]))
    fill(model)
    with torch.no_grad():
        for path, part in weights(model, "default").items():
            if "layers.1.mlp" not in path:
                part.lora_B[:, 1:] = 0
    ids = token_ids(16, 20)
    with torch.no_grad():
        target = model(input_ids=ids).logits
        target += 0.01 * torch.randn(target.shape)
    report = find_rank(model=model, losses=lambda m: (m(input_ids=ids).logits - target).square().mean((1, 2)))
    assert report.rank == 8
    assert report.ranks["model.layers.1.mlp.down_proj"] == 8
    assert max(r for path, r in report.ranks.items() if path != "model.layers.1.mlp.down_proj") == 1
    assert report.saving > 0.5
    assert report.rank_pattern == {path: r for path, r in report.ranks.items() if r != 8}
    assert "fewer parameters" in repr(report)
    assert "more might do better" in repr(report)


def test_an_adapter_cut_to_the_report_computes_what_was_scored(trained, tmp_path) -> None:
    model, run = trained
    report = find_rank(run, cost=1e6)
    made = shrink(model, report)
    assert made.name == f"default-r{report.rank}"
    assert adapters(model).active == (made.name,)
    assert {path: m.rank for path, m in made.matched.items()} == report.ranks
    assert {m.scale for m in made.matched.values()} == {1.5}
    again = find_rank(run, name=made.name, cost=1e6)
    assert again.scores[max(again.scores)].loss == pytest.approx(report.pattern_loss, abs=1e-4)
    ids = token_ids()
    save(model, tmp_path, made.name)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.allclose(other(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


def test_polish_trains_the_cut_adapter_and_leaves_the_other(trained) -> None:
    model, run = trained
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = find_rank(run, polish=3)
    assert report.adapter == f"default-r{report.rank}"
    assert report.polished != report.pattern_loss
    assert adapters(model).active == ("default",)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert "trained on" in repr(report)


def test_an_adapter_that_learnt_nothing_is_said_to() -> None:
    model, ids = tiny_llama(), token_ids(12)
    attach(model, LoraConfig(r=4, lora_alpha=6))
    report = find_rank(model=model, losses=lambda m: m(input_ids=ids).logits.square().mean((1, 2)))
    assert report.rank == 1
    assert report.base_loss == pytest.approx(report.scores[4].loss)
    assert "they say nothing of a rank" in repr(report)


def test_a_run_keeps_no_model_alive_and_can_be_stored(trained) -> None:
    model, run = trained
    assert run.origin.model is model
    assert pickle.loads(pickle.dumps(run)).origin is None  # noqa: S301
    assert pickle.loads(pickle.dumps(run)).losses == run.losses  # noqa: S301
    del model, trained
    gc.collect()


def test_fewer_held_out_examples_where_the_run_was_short(trained) -> None:
    _, run = trained
    assert find_rank(run, cost=1e6).examples == 20
    assert find_rank(run, cost=1e-6).examples == 8


def test_running_text_is_cut_where_whole_blocks_would_cost_too_much() -> None:
    text, pair = [Block([i + 1] * 40, [i + 1] * 40) for i in range(9)], [Block([1] * 40, [IGNORE] * 30 + [1] * 10)] * 9
    model, reader = tiny_llama().eval(), SimpleNamespace(pad_token_id=0)
    with torch.no_grad():
        assert of_blocks(model, reader, text, 8 * 20)().tokens.tolist() == [19] * 8
        assert of_blocks(model, reader, text, 1)().tokens.tolist() == [15] * 8
        assert of_blocks(model, reader, text, 9 * 40)().tokens.tolist() == [39] * 9
        assert of_blocks(model, reader, pair, 8 * 20)().tokens.tolist() == [10] * 8


@pytest.mark.parametrize(
    "settings", [{"tolerance": -0.1}, {"tolerance": "x"}, {"cost": 0}, {"cost": float("nan")}, {"polish": -1}, {"polish": 1.5}]
)
def test_settings_that_cannot_be(settings) -> None:
    with pytest.raises(ConfigError, match=f"find_rank\\({next(iter(settings))}="):
        find_rank(model=nn.Linear(2, 2), **settings)


def test_what_is_missing_is_named(trained) -> None:
    model, run = trained
    with pytest.raises(RankError, match="needs model=…, as there is no run"):
        find_rank()
    with pytest.raises(RankError, match="needs eval_dataset=…"):
        find_rank(model=model)
    run.origin.eval_dataset = None
    with pytest.raises(RankError, match="the run has no eval_dataset"):
        find_rank(run)
    with pytest.raises(RankError, match="There are 5 held-out blocks"):
        find_rank(run, eval_dataset=dataset([Block(ids, ids) for ids in token_ids(5, 9).tolist()]))
    with pytest.raises(RankError, match="gave a float"):
        find_rank(model=model, losses=lambda _: 1.0)
    with pytest.raises(RankError, match=r"shape \(3,\)"):
        find_rank(model=model, losses=lambda _: torch.ones(3))
    with pytest.raises(RankError, match="needs tokenizer"):
        find_rank(model=model, losses=lambda _: pytest.fail("ran"), polish=2)
    with pytest.raises(RankError, match="NaN or infinite"):
        find_rank(model=model, losses=lambda _: torch.full((9,), float("inf")))
    with pytest.raises(RankError, match="not a str"):
        find_rank("run")
    run.adapter = "a, b"
    with pytest.raises(RankError, match=r"several adapters \(a, b\)"):
        find_rank(run)
    with pytest.raises(AdapterError, match="no adapter 'defalt'"):
        find_rank(run, name="defalt")
    set_active(model, [])
    with pytest.raises(AdapterError, match="no active adapter"):
        find_rank(model=model)
