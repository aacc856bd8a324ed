"""The HTTP door: OpenAI's shape, the token, and a reason for every refusal."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import lora_nb as ln
from lora_nb.errors import ServingError
from lora_nb.http_door import MOST_BYTES, Door, door
from lora_nb.http_request import ABSENT, read
from tests.models import fill
from tests.test_serving import KINDS, TOKENIZER, alone, made, slow
from tests.text import byte_llama

TOKEN = "a-secret"  # noqa: S105


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, and some that cannot be served."""
    path = tmp_path_factory.mktemp("adapters")
    made(path)
    other = byte_llama(seed=9)
    ln.attach(other, KINDS["lora2"])
    fill(other)
    ln.save(other, path / "elsewhere")
    (path / "broken").mkdir()
    (path / "broken" / "adapter_config.json").write_text("{")
    return path


@pytest.fixture
def server(folder: Path):
    with ln.AdapterServer(byte_llama(), TOKENIZER, folder=folder) as server:
        yield server


async def called(app, body: bytes | dict, path: str = "/v1/completions", hang_up: float | None = None, **headers: str):
    """One request to the application itself: status, headers, body."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    gone = time.monotonic() + (3600 if hang_up is None else hang_up)
    sent, given = [], [{"type": "http.request", "body": body, "more_body": False}]
    named = {"host": "localhost", "authorization": f"Bearer {TOKEN}", **headers}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST" if path == "/v1/completions" else "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in named.items()],
    }

    async def receive() -> dict:
        if given:
            return given.pop()
        if time.monotonic() < gone:
            await asyncio.sleep(gone - time.monotonic())
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = next(m for m in sent if m["type"] == "http.response.start")
    answer = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, answer


def post(server: ln.AdapterServer, body: bytes | dict, **headers: str) -> tuple[int, dict]:
    status, _, answer = asyncio.run(called(door(server, TOKEN), body, **headers))
    return status, json.loads(answer)


def test_a_completion(server: ln.AdapterServer, folder: Path) -> None:
    status, answer = post(server, {"model": "lora8", "prompt": "ça va", "max_tokens": 10})
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == "lora8"
    choice = answer["choices"][0]
    assert choice["text"].strip() == alone(folder, "ça va", "lora8")
    assert choice["finish_reason"] in {"stop", "length"}
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    status, answer = post(server, {"model": "base", "prompt": ["a", "ça va"], "max_tokens": 10, "top_p": 1, "user": "me", "n": None})
    assert [c["text"].strip() for c in answer["choices"]] == [alone(folder, p, None) for p in ("a", "ça va")]
    assert [c["index"] for c in answer["choices"]] == [0, 1]


def test_a_stream(server: ln.AdapterServer) -> None:
    body = {"model": "dora", "prompt": ["ça va", "a"], "max_tokens": 12}
    _, whole = post(server, body)
    status, headers, raw = asyncio.run(called(door(server, TOKEN), {**body, "stream": True}))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(e)["choices"][0] for e in events]
    for i in (0, 1):
        mine = [c for c in choices if c["index"] == i]
        assert "".join(c["text"] for c in mine) == whole["choices"][i]["text"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][i]["finish_reason"]


def test_what_there_is(server: ln.AdapterServer) -> None:
    status, _, answer = asyncio.run(called(door(server, TOKEN, base="tiny"), b"", "/v1/models"))
    assert status == 200
    assert {m["id"] for m in json.loads(answer)["data"]} == {"tiny", "broken", "elsewhere", *KINDS}
    server.submit("a", "lora2", max_new_tokens=3).result(20)
    status, _, answer = asyncio.run(called(door(server, TOKEN), b"", "/figures"))
    assert json.loads(answer)["adapters"]["lora2"]["done"] == 1


def asked(**changes: object) -> dict:
    return {"model": "lora2", "prompt": "a", "max_tokens": 2, **changes}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (asked(model="lora3"), 404, "no adapter 'lora3'. Did you mean 'lora"),
        (asked(model="../lora2"), 404, "no adapter"),
        (asked(model="..\\lora2"), 404, "no adapter"),
        (asked(model="/etc/passwd"), 404, "no adapter"),
        (asked(model=""), 404, "no adapter ''"),
        (asked(model="elsewhere"), 422, "trained on another base"),
        (asked(model="broken"), 422, "adapter_config.json"),
        (asked(prompt="x" * 200), 400, "exceed the model's 128 positions"),
        (asked(max_tokens=500), 400, "exceed the model's 128 positions"),
        (asked(max_tokens=0), 400, "must be a whole number of at least 1"),
        (asked(max_tokens=True), 400, "'max_tokens' is of the type bool"),
        (asked(temperature=-1), 400, "temperature=-1"),
        (asked(seed=2**70), 400, "seed="),
        (asked(prompt=[]), 400, "list of 1 to 16 texts"),
        (asked(prompt=["a"] * 17), 400, "list of 1 to 16 texts"),
        (asked(prompt=[[1, 2]]), 400, "list of 1 to 16 texts"),
        (asked(prompt="\ud800"), 400, "surrogate"),
        (asked(n=2), 400, "'n' is not supported"),
        (asked(stop=["\n"]), 400, "'stop' is not supported"),
        (asked(max_token=2), 400, "no setting 'max_token'"),
        ({"prompt": "a"}, 400, "needs 'model'"),
        ({"model": "lora2"}, 400, "needs 'prompt'"),
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff\xfe\xfd", 400, "not JSON"),
        (b'{"temperature": NaN}', 400, "NaN is no number"),
        (b'{"temperature": 1e999, "model": "lora2", "prompt": "a"}', 400, "temperature=inf"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b" " * (MOST_BYTES + 1), 413, "longer than"),
    ],
)
def test_bad_requests_get_their_reason(server: ln.AdapterServer, body, status: int, reason: str) -> None:
    found, answer = post(server, body)
    assert found == status
    assert reason in answer["error"]["message"]
    assert post(server, asked())[0] == 200


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Basic a-secret", f"Bearer {TOKEN} ", f"bearer {TOKEN}x", "Bearer é"])
def test_without_the_token_nothing_is_said(server: ln.AdapterServer, given: str) -> None:
    app = door(server, TOKEN)
    for path in ("/v1/completions", "/v1/models", "/figures"):
        status, headers, answer = asyncio.run(called(app, asked(), path, authorization=given))
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert "lora2" not in answer.decode()


def test_another_hosts_name_is_refused(server: ln.AdapterServer) -> None:
    assert asyncio.run(called(door(server, TOKEN), asked(), host="evil.example"))[0] == 400
    assert asyncio.run(called(door(server, TOKEN), b"", "/v1/nothing"))[0] == 404


def test_a_full_queue_and_a_closed_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ln.AdapterServer(byte_llama(), TOKENIZER, folder=folder, max_batch=1, max_queue=1) as server:
        slow(server, monkeypatch, 0.05)
        running = server.submit("a", max_new_tokens=60)
        while running.begun is None:
            time.sleep(0.01)
        server.submit("a")
        status, headers, _ = asyncio.run(called(door(server, TOKEN), asked()))
        assert (status, headers["retry-after"]) == (429, "1")
    assert post(server, asked())[0] == 503


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_written_for(server: ln.AdapterServer, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(server, monkeypatch, 0.05)
    body = asked(max_tokens=100, stream=stream)
    asyncio.run(asyncio.wait_for(called(door(server, TOKEN), body, hang_up=0.3), 30))
    end = time.monotonic() + 20
    while server.figures().running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert server.figures().adapters["lora2"].cancelled == 1


def fuzzed(rng: random.Random) -> bytes:
    """A good body with something done to it."""
    values = [None, True, 0, -1, 2**80, 1e308, 0.5, "", "x", "lora2", "../lora2", "\ud800", [], {}, [[]], ["a"], {"a": 1}, "a" * 300]
    body = asked(max_tokens=1)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*body, *ABSENT, "stream", "seed", "temperature", "user", "tools", "\x00", "é"])
        if rng.random() < 0.15:
            body.pop(key, None)
        else:
            body[key] = rng.choice(values)
    raw = bytearray(json.dumps(body).encode())
    kind = rng.random()
    if kind < 0.4:
        for _ in range(rng.randint(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind < 0.55:
        del raw[rng.randrange(len(raw)) :]
    elif kind < 0.65:
        raw = bytearray(rng.randbytes(rng.randint(0, 60)))
    return bytes(raw)


def test_ten_thousand_fuzzed_bodies(server: ln.AdapterServer) -> None:
    rng, app = random.Random(7), door(server, TOKEN)

    async def all_of_them() -> list[int]:
        found = []
        for _ in range(10_000):
            status, _, answer = await called(app, fuzzed(rng))
            assert status == 200 or json.loads(answer)["error"]["message"], answer
            found.append(status)
        return found

    found = asyncio.run(all_of_them())
    assert set(found) <= {200, 400, 404}
    assert 0 < found.count(200) < 3000
    assert post(server, asked())[0] == 200
    assert not server.figures().running


def test_over_a_socket(folder: Path) -> None:
    server = ln.AdapterServer(byte_llama(), TOKENIZER, folder=folder)
    with Door(server, TOKEN) as opened:
        assert "127.0.0.1" in opened.address
        request = urllib.request.Request(f"{opened.address}/completions", json.dumps(asked(max_tokens=10)).encode())  # noqa: S310
        request.add_header("Authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            assert json.loads(answer.read())["choices"][0]["text"].strip() == alone(folder, "a", "lora2")
        with pytest.raises(ServingError, match="cannot be had"):
            Door(server, TOKEN, port=int(opened.address.split(":")[2].split("/")[0]))
    with pytest.raises(ServingError, match="closed"):
        server.submit("a")
    assert not any(t.name.startswith("lora_nb") for t in threading.enumerate())


def test_a_body_that_is_right() -> None:
    wanted = read(json.dumps(asked(temperature=0.5, seed=3, stream=True)).encode())
    assert wanted.settings == {"max_new_tokens": 2, "temperature": 0.5, "seed": 3}
    assert wanted.stream
    assert wanted.prompts == ["a"]
