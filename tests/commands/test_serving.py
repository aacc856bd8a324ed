"""`adapters` and `serve`: what many adapters take, and a server of them for a notebook or a terminal."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch

import lora_nb as ln
from lora_nb.commands import Session, adapters, serve
from lora_nb.errors import AdapterFileError, ConfigError
from lora_nb.http_door import Door


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, (model, _) = tmp_path_factory.mktemp("many"), ln.load("tiny", device="cpu")
    for name in ("one", "two"):
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=10), name)
        with torch.no_grad():
            for p in ln.parameters(model, name).values():
                p.normal_(std=0.05)
        ln.save(model, path / name, name)
    return path


def test_adapters(folder: Path, tmp_path: Path) -> None:
    table = adapters(Session(), str(folder))
    assert [Path(name).name for name in table.adapters] == ["one", "two"]
    assert table.as_models > 10 * table.total
    assert "times as much" in repr(table)
    smaller = adapters(Session(), str(folder), kind="int8", out=str(tmp_path / "small"))
    assert smaller.total < 0.5 * table.total
    for wrong in ({"kind": "int8"}, {"out": "x"}, {"base": "nowhere"}):
        with pytest.raises(ConfigError):
            adapters(Session(), str(folder), **wrong)
    with pytest.raises(AdapterFileError, match="has no adapters"):
        adapters(Session(), str(tmp_path / "none"))


def test_serve_in_a_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setenv("LORA_NB_TOKEN", "mine")
    session = Session(say=said.append, lasting=True)
    own, _ = session.open("tiny")
    opened = serve(session, str(folder))
    assert opened.server.model is not own
    assert session.named["door"] is opened
    assert "LORA_NB_TOKEN" in str(said[0])
    assert "mine" not in str(said[0])
    with opened:
        body = json.dumps({"model": "two", "prompt": "Could you please", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{opened.address}/completions", body, {"Authorization": "Bearer mine"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            assert json.loads(answer.read())["model"] == "two"
    with pytest.raises(AdapterFileError, match="has no adapters"):
        serve(session, "nowhere")


def test_serve_in_a_terminal_until_it_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.delenv("LORA_NB_TOKEN", raising=False)

    def stop(_: Door) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Door, "wait", stop)
    assert serve(Session(say=said.append), str(folder)) is None
    assert "its token is" in str(said[0])
    assert said[-1] == "stopping"
