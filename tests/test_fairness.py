"""Whoever got least is next; and nobody saves up."""

from __future__ import annotations

from lora_nb.fairness import FairQueue


def served(queue: FairQueue[str], count: int, cost: float = 1) -> list[str]:
    out = []
    for _ in range(count):
        name = queue.order()[0]
        out.append(queue.pop(name))
        queue.charge(name, cost)
    return out


def test_turns_are_taken() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("a", f"a{i}", [])
    queue.push("b", "b0", [])
    queue.push(None, "base0", [])
    assert served(queue, 6) == ["a0", "b0", "base0", "a1", "a2", "a3"]
    assert not len(queue)


def test_a_long_text_counts_for_more() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "ab":
        for i in range(3):
            queue.push(name, f"{name}{i}", [])
    queue.charge("a", 2.5)
    assert served(queue, 6) == ["b0", "b1", "b2", "a0", "a1", "a2"]


def test_who_pauses_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a0", [])
    queue.push("b", "b0", [])
    assert served(queue, 2, 100) == ["a0", "b0"]
    queue.push("a", "a1", ["b"])
    queue.charge("a", 900)
    queue.push("c", "c0", ["a", "b"])
    assert queue._served["c"] == queue._served["b"] == 100


def test_requests_are_taken_out() -> None:
    queue: FairQueue[str] = FairQueue()
    for one in ("a0", "a1", "b0"):
        queue.push(one[0], one, [])
    assert queue.remove_if(lambda one: one.endswith("0")) == ["a0", "b0"]
    assert list(queue) == ["a1"]
    assert queue.first("a") == "a1"
