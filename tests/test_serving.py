"""A server of adapters: each text is what `generate` gives, whoever else is served; and nobody waits for what is not his."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.attach import adapters, layers
from lora_nb.errors import AdapterError, AdapterFileError, BaseModelError, ConfigError, QueueFullError, ServingError
from tests.models import fill
from tests.text import byte_llama, byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPTS = ["a", "a much longer prompt, of many letters", "ça va", "xyz " * 9]
KINDS = {
    "lora2": ln.LoraConfig(r=2, lora_alpha=12),
    "lora8": ln.LoraConfig(r=8, lora_alpha=12, target_modules="all-linear"),
    "dora": ln.LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "houlsby": ln.BottleneckConfig.houlsby(),
    "pfeiffer": ln.BottleneckConfig.pfeiffer(),
}


def made(folder: Path, kinds: dict = KINDS, copies: int = 1) -> list[str]:
    """Adapters saved under the names of their kinds."""
    names = []
    for i in range(copies):
        for kind, config in kinds.items():
            model, name = byte_llama(), kind if copies == 1 else f"{kind}-{i}"
            ln.attach(model, config, name)
            generator = torch.Generator().manual_seed(len(names))
            with torch.no_grad():
                for p in ln.parameters(model).values():
                    p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            ln.save(model, folder / name)
            names.append(name)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    made(path)
    return path


def alone(folder: Path, prompt: str, name: str | None, count: int = 10) -> str:
    model = byte_llama()
    if name is not None:
        ln.load_adapter(model, folder / name, name)
    return str(ln.generate(model, TOKENIZER, prompt, max_new_tokens=count))


def served(folder: Path, **settings: object) -> ln.AdapterServer:
    return ln.AdapterServer(byte_llama(), TOKENIZER, folder=folder, **settings)


def wait_for(happened, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"device_slots": 1, "host_slots": 0},
        {"device_slots": 2, "host_slots": 1, "max_batch": 3},
        {"max_batch": 1},
        {"prefill_tokens": 1},
    ],
)
def test_every_text_is_the_text_alone(folder: Path, sizes: dict) -> None:
    jobs = [(prompt, name) for prompt in PROMPTS for name in [*KINDS, None]]
    with served(folder, **sizes) as server:
        texts = server.generate([p for p, _ in jobs], [n for _, n in jobs], max_new_tokens=10)
        figures = server.figures()
    assert [t.strip() for t in texts] == [alone(folder, p, n) for p, n in jobs]
    assert {name: f.done for name, f in figures.adapters.items()} == dict.fromkeys([*KINDS, "base"], len(PROMPTS))
    assert figures.tokens == sum(f.tokens for f in figures.adapters.values()) > 0
    assert len(figures.in_slots) <= sizes.get("device_slots", 8)
    assert "lora8" in repr(figures)
    assert "<table>" in figures._repr_html_()


def test_texts_join_and_leave_between_steps(folder: Path) -> None:
    with served(folder, max_batch=4) as server:
        tickets = []
        for i, count in enumerate((30, 3, 12, 1, 25, 7, 2, 18)):
            tickets.append((PROMPTS[i % 4], [*KINDS, None][i % 6], count))
            tickets[-1] += (server.submit(*tickets[-1][:2], max_new_tokens=count),)
            time.sleep(0.01)
        for prompt, name, count, ticket in tickets:
            assert ticket.result(20).text.strip() == alone(folder, prompt, name, count)


def test_a_stream_is_the_text_in_pieces(folder: Path) -> None:
    with served(folder) as server:
        ticket = server.submit("ça va", "lora8", max_new_tokens=20)
        pieces = list(ticket)
        assert "".join(pieces) == ticket.result().text
        assert len(pieces) > 3
        done = ticket.result()
    assert done.finish_reason in {"length", "stop"}
    assert done.tokens <= 20
    assert done.prompt_tokens == len(TOKENIZER("ça va")["input_ids"]) + 1
    assert 0 <= done.waited <= done.first_token <= done.seconds
    assert "lora8" in repr(done)
    assert "lora8" in done._repr_html_()


def test_a_seed_gives_the_same_text_whoever_else_is_served(folder: Path) -> None:
    with served(folder) as server:

        def drawn(seed: int) -> str:
            return server.submit("a", "lora2", temperature=1.5, seed=seed, max_new_tokens=12).result(20).text

        first = drawn(3)
        others = [server.submit(p, "dora", max_new_tokens=30) for p in PROMPTS]
        assert drawn(3) == first
        assert drawn(4) != first
        for ticket in others:
            ticket.result(20)


def test_cancelling_and_time_limits_keep_what_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder, max_batch=1) as server:
        slow(server, monkeypatch, 0.02)
        running = server.submit("a", "lora8", max_new_tokens=100)
        late = server.submit("a", "lora2", max_new_tokens=100, time_limit=0.2)
        waiting = server.submit("a", max_new_tokens=3)
        unwanted = server.submit("a", "dora", max_new_tokens=3)
        unwanted.cancel()
        wait_for(lambda: len(running.tokens) > 2)
        assert unwanted.result(20).finish_reason == "cancelled"
        assert unwanted.result().tokens == 0
        running.cancel()
        result = running.result(20)
        assert result.finish_reason == "cancelled"
        assert 2 < result.tokens < 100
        assert alone(folder, "a", "lora8", result.tokens) == result.text.strip()
        assert late.result(20).finish_reason == "time_limit"
        assert waiting.result(20).tokens <= 3
        with pytest.raises(TimeoutError, match="has not ended in 0 s"):
            server.submit("a", max_new_tokens=60).result(0)
    figures = server.figures().adapters
    assert figures["dora"].cancelled == figures["lora8"].cancelled == figures["lora2"].late == 1


def slow(server: ln.AdapterServer, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = server.scheduler._step
    monkeypatch.setattr(server.scheduler, "_step", lambda: (time.sleep(seconds), step()))


def test_a_full_queue_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder, max_batch=1, max_queue=2) as server:
        slow(server, monkeypatch, 0.05)
        first = server.submit("a", max_new_tokens=60)
        wait_for(lambda: first.begun is not None)
        for _ in range(2):
            server.submit("a")
        with pytest.raises(QueueFullError, match=r"2 requests wait already.* ask again later"):
            server.submit("a")
    assert first.result().finish_reason == "cancelled"  # the server was closed
    with pytest.raises(ServingError, match="closed"):
        server.submit("a")


def test_a_cold_adapter_delays_nobody_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder) as server:
        server.submit("a", "lora2").result(20)
        gate, load = threading.Event(), server.tiers._load
        monkeypatch.setattr(server.tiers, "_load", lambda name: (gate.wait(20), load(name))[1])
        cold = server.submit("a", "dora", max_new_tokens=5)
        assert [server.submit(p, "lora2", max_new_tokens=5).result(20).tokens for p in PROMPTS]
        assert not cold.done
        gate.set()
        assert cold.result(20).text.strip() == alone(folder, "a", "dora", 5)


def test_fair_between_adapters(folder: Path) -> None:
    """Forty requests for one adapter do not keep a single one for another waiting behind them."""
    with served(folder, max_batch=2) as server:
        crowd = [server.submit("a", "lora8", max_new_tokens=10) for _ in range(40)]
        one = server.submit("a", "dora", max_new_tokens=10)
        one.result(20)
        assert sum(ticket.done for ticket in crowd) < 20


def test_more_adapters_than_slots_all_get_their_turn(tmp_path: Path) -> None:
    names = made(tmp_path, {"lora2": KINDS["lora2"]}, copies=7)
    with served(tmp_path, device_slots=2, host_slots=2) as server:
        tickets = [(name, server.submit("a", name, max_new_tokens=12)) for name in names * 2]
        for name, ticket in tickets:
            assert ticket.result(20).text.strip() == alone(tmp_path, "a", name, 12)
        assert len(server.figures().in_slots) == 2
        assert len(server.tiers.host) <= 2
        assert sum(server.figures().loads.values()) >= 7


def test_the_model_is_given_back_as_it_was(folder: Path) -> None:
    model = byte_llama().train()
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    modules = {n: id(m) for n, m in model.named_modules()}
    with ln.AdapterServer(model, TOKENIZER, folder=folder) as server:
        server.generate(["a"] * 5, list(KINDS), max_new_tokens=3)
        assert not model.training
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert model.training
    assert not adapters(model).reports
    assert threading.active_count() < 10


def test_adapters_that_the_model_carries(folder: Path) -> None:
    model = byte_llama()
    ln.attach(model, KINDS["lora8"], "own")
    fill(model, "own", seed=5)
    expected = ln.generate(model, TOKENIZER, "a", max_new_tokens=10)
    with ln.AdapterServer(model, TOKENIZER, folder=folder) as server:
        assert server.adapters() == sorted([*KINDS, "own"])
        texts = server.generate(["a", "a", "a"], ["own", None, "dora"], max_new_tokens=10)
    assert texts[0].strip() == expected
    assert texts[2].strip() == alone(folder, "a", "dora")
    assert adapters(model).active == ("own",)
    assert ln.generate(model, TOKENIZER, "a", max_new_tokens=10) == expected
    assert all(p.requires_grad for p in ln.parameters(model).values())


def test_adapters_come_change_and_go(tmp_path: Path, folder: Path) -> None:
    with served(folder) as server:
        with pytest.raises(AdapterError, match="no adapter 'new'"):
            server.submit("a", "new")
        made(tmp_path, {"lora2": KINDS["lora2"]})
        server.add("new", tmp_path / "lora2")
        first = server.submit("a", "new", max_new_tokens=10).result(20).text.strip()
        assert first == alone(tmp_path, "a", "lora2")
        model = byte_llama()
        ln.attach(model, KINDS["lora2"])
        fill(model, seed=77)
        ln.save(model, tmp_path / "lora2")
        time.sleep(0.05)
        server.submit("a", max_new_tokens=1).result(20)
        second = [server.submit("a", "new", max_new_tokens=10).result(20).text.strip() for _ in range(2)][1]
        assert second == alone(tmp_path, "a", "lora2") != first
        server.remove("new")
        with pytest.raises(AdapterError, match="no adapter 'new'"):
            server.submit("a", "new")
        for name, path, words in [("../x", tmp_path, "cannot name"), ("y", tmp_path / "none", "has no adapter_config")]:
            with pytest.raises((AdapterError, AdapterFileError), match=words):
                server.add(name, path)
        with pytest.raises(AdapterError, match="No adapter 'y' was added"):
            server.remove("y")


def test_a_folder_that_cannot_be_read_fails_its_own_requests(tmp_path: Path) -> None:
    made(tmp_path, {"lora2": KINDS["lora2"], "lora8": KINDS["lora8"], "dora": KINDS["dora"]})
    weights = tmp_path / "lora8" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (tmp_path / "dora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "many"}')
    other = byte_llama(seed=9)
    ln.attach(other, KINDS["lora2"])
    ln.save(other, tmp_path / "elsewhere")
    with served(tmp_path) as server:
        bad = [server.submit("a", name) for name in ("lora8", "dora", "elsewhere")]
        good = server.submit("a", "lora2", max_new_tokens=8)
        for ticket, words in zip(bad, ("safetensors", "r", "another base"), strict=True):
            with pytest.raises(ln.LoraNbError, match=words):
                ticket.result(20)
        assert good.result(20).text.strip() == alone(tmp_path, "a", "lora2", 8)
        assert server.figures().adapters["lora8"].failed == 1


def test_names_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    made(tmp_path / "secret", {"lora2": KINDS["lora2"]})
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "secret" / "lora2")
    with served(inside) as server:
        for name in ("../secret/lora2", "..", ".", "", "link", "/etc", "a/b", "a\x00b", "x" * 5000):
            with pytest.raises(AdapterError, match="no adapter"):
                server.submit("a", name)


def test_an_adapter_without_finite_numbers_fails_alone() -> None:
    model = byte_llama()
    for name in ("bad", "good"):
        ln.attach(model, KINDS["lora8"], name)
        fill(model, name)
    with torch.no_grad():
        for p in ln.parameters(model, "bad").values():
            p.fill_(3e37)
    with ln.AdapterServer(model, TOKENIZER) as server:
        tickets = [server.submit("abc", n, max_new_tokens=6) for n in ("good", "bad", "good", "bad", None)]
        for ticket in tickets[1::2]:
            with pytest.raises(ServingError, match="'bad' gave no finite numbers"):
                ticket.result(20)
        texts = [t.result(20).text for t in tickets[::2]]
        assert server.generate(["abc"] * 3, ["good", "good", None], max_new_tokens=6) == texts


def test_a_broken_step_ends_its_requests_and_not_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder) as server:
        step = server.scheduler._step
        monkeypatch.setattr(server.scheduler, "_step", lambda: 1 / 0)
        with pytest.raises(ServingError, match="A step failed: ZeroDivisionError"):
            server.submit("a").result(20)
        monkeypatch.setattr(server.scheduler, "_step", step)
        assert server.submit("a", "lora2", max_new_tokens=5).result(20).text.strip() == alone(folder, "a", "lora2", 5)


def test_an_attention_of_its_own_is_refused() -> None:
    from tests.models import tiny_falcon

    model = tiny_falcon()
    with pytest.raises(BaseModelError, match="computes attention by itself"):
        ln.AdapterServer(model, TOKENIZER)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": ""}, None),
        ({"prompt": 3}, "needs a prompt"),
        ({"prompt": "a\ud800"}, "surrogate"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt": "a" * 200}, "exceed the model's 128 positions"),
        ({"prompt": "a", "temperature": -1}, "temperature=-1"),
        ({"prompt": "a", "seed": 1.5}, "seed=1.5"),
        ({"prompt": "a", "time_limit": 0}, "time_limit=0"),
    ],
)
def test_bad_requests(folder: Path, arguments: dict, words: str | None) -> None:
    with served(folder) as server:
        if words is None:
            assert server.submit(**arguments, max_new_tokens=2).result(20).tokens <= 2
        else:
            with pytest.raises(ConfigError, match=words):
                server.submit(**arguments)
        with pytest.raises(ConfigError, match="one adapter for all or a list of as many"):
            server.generate(["a"], ["lora2", "dora"])


@pytest.mark.parametrize("wrong", [{"device_slots": 0}, {"host_slots": -1}, {"max_batch": 2.5}])
def test_bad_sizes(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))}=.*whole number"):
        ln.AdapterServer(nn.Linear(1, 1), TOKENIZER, **wrong)


def test_no_routing_is_left(folder: Path) -> None:
    model = byte_llama()
    ln.attach(model, KINDS["lora2"])
    with ln.AdapterServer(model, TOKENIZER, folder=folder) as server:
        server.generate(["a"] * 3, ["default", "dora", None], max_new_tokens=3)
    assert all(layer.routing is None for _, layer in layers(model))
    assert model.config._attn_implementation == "sdpa"
