"""Exercises of `05_adapters`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.checks.exercises import Mistake, NotSolved, exercise, value_of

WIDTH, SIZE = 24, 6


@exercise(
    "05.1",
    "Build a bottleneck adapter",
    difficulty=3,
    minutes=20,
    hints=(
        "In __init__ make two layers: self.down = nn.Linear(width, size) and self.up = nn.Linear(size, width).",
        "forward(x) gives x plus what the network makes of it: x + self.up(torch.relu(self.down(x))).",
        "To start as the identity, set weight and bias of self.up to zero: nn.init.zeros_(self.up.weight). Leave self.down random.",
    ),
)
def bottleneck(answer: Any) -> str:
    """x + U f(D x + d) + u, with U and u zero at the start."""
    torch.manual_seed(0)
    adapter = value_of(answer, WIDTH, SIZE)
    if not isinstance(adapter, nn.Module):
        raise Mistake("the answer is the class itself, a subclass of nn.Module: give it without calling it.")
    x = torch.randn(2, 5, WIDTH)
    y = value_of(adapter, x)
    _check_start(adapter, x, y)
    _check_gradients(adapter, x)
    _check_network(adapter, x)
    return (
        f"it starts as the identity, learns, and has {sum(p.numel() for p in adapter.parameters())} numbers at width {WIDTH}, size {SIZE}."
    )


def _count(adapter: nn.Module) -> int:
    return sum(p.numel() for p in adapter.parameters())


def _check_start(adapter: nn.Module, x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Mistake(f"of {tuple(x.shape)} it should make {tuple(x.shape)}, and it makes {tuple(getattr(y, 'shape', ()))}.")
    found, right = _count(adapter), 2 * WIDTH * SIZE + WIDTH + SIZE
    if not found:
        raise NotSolved
    if not y.any():
        raise Mistake("at the start it gives zero, whatever goes in: the residual is missing. Add x to what the network makes of it.")
    if not torch.equal(x, y):
        raise Mistake("before training it should give back exactly what goes in: let the second layer, weight and bias, start at zero.")
    if found == 2 * WIDTH * SIZE:
        raise Mistake("it has no biases; Houlsby's adapter has one in each of its two layers.")
    if found != right:
        raise Mistake(
            f"at width {WIDTH} and size {SIZE} it should have {right} numbers, and has {found}: two layers, {WIDTH} → {SIZE} → {WIDTH}."
        )


def _check_gradients(adapter: nn.Module, x: Tensor) -> None:
    adapter(x).square().sum().backward()
    if not any(p.grad is not None and p.grad.any() and p.ndim == 2 for p in adapter.parameters()):
        raise Mistake("no matrix gets a gradient: with both layers at zero each waits for the other. Only the second one starts at zero.")


@torch.no_grad()
def _check_network(adapter: nn.Module, x: Tensor) -> None:
    for p in adapter.parameters():
        p.normal_()
    matrices = {tuple(p.shape): p for p in adapter.parameters()}
    down, up = matrices.get((SIZE, WIDTH)), matrices.get((WIDTH, SIZE))
    if down is None or up is None:
        raise Mistake(f"its matrices have shapes {sorted(matrices)}: one layer leads from {WIDTH} to {SIZE}, the other back.")
    update = adapter(x) - x
    middle = adapter((x + 2 * x.flip(0)) / 3) - (x + 2 * x.flip(0)) / 3
    if torch.allclose(middle, (update + 2 * update.flip(0)) / 3, atol=1e-3):
        raise Mistake(
            "it is linear: between the two layers a non-linearity such as torch.relu is missing. A single matrix could do the same."
        )
    if int(torch.linalg.matrix_rank((update - update[0, 0]).view(-1, WIDTH), rtol=1e-4)) > SIZE:
        raise Mistake(
            "its update does not stay in the bottleneck: the non-linearity goes between the layers, and nothing after the second."
        )


@exercise(
    "05.2",
    "How large is an adapter?",
    difficulty=2,
    minutes=10,
    hints=(
        "The bottleneck has width / reduction factor numbers: 256 / 8 = 32.",
        "One adapter has a matrix down (32 × 256) with 32 biases, and a matrix up (256 × 32) with 256 biases.",
        "Houlsby puts two into each of the 6 blocks.",
    ),
)
def size(answer: Any) -> str:
    """6 · 2 · (2 · 256 · 32 + 32 + 256)."""
    one = 2 * 256 * 32 + 32 + 256
    wrong = {
        6 * one: "that is one adapter a block; Houlsby has two, after attention and after the MLP.",
        one: "that is a single adapter; there are two in each of the 6 blocks.",
        2 * one: "that is one block; the model has 6.",
        12 * 2 * 256 * 32: "the matrices are all there; the biases are missing, one number for each output of a layer.",
        12 * (2 * 256 * 8 + 8 + 256): "8 is the reduction factor, not the size of the bottleneck, which is 256 / 8.",
        12 * (256 * 32 + 32): "that is the way down only; each adapter leads back up as well.",
    }
    if answer in wrong:
        raise Mistake(wrong[answer])
    if answer != 12 * one:
        raise Mistake(
            f"one adapter has {one:,} numbers; {answer} is no whole number of them." if answer % one else "count the adapters again."
        )
    return f"twelve adapters of {one:,} numbers, {12 * one:,} in all: halving the factor doubles the matrices, not the biases on top."


@exercise(
    "05.3",
    "Two adapters, one behind the other",
    difficulty=2,
    minutes=10,
    hints=(
        "The first adapter gives h = x + first(x).",
        "The second one sees h, not x, and adds its own update to h.",
    ),
)
def stacked(answer: Any) -> str:
    """h = x + first(x), then h + second(h)."""
    x = torch.linspace(-2, 2, 9)

    def first(h: Tensor) -> Tensor:
        return h.clamp(min=0)

    def second(h: Tensor) -> Tensor:
        return 3 * torch.tanh(h - 1)

    found, h = value_of(answer, x, first, second), x + first(x)
    turned = x + second(x)
    wrong = (
        (x + first(x) + second(x), "both look at x: that is two adapters side by side. Stacked, the second looks at what the first made."),
        (turned + first(turned), "that is the other order: the second adapter acted before the first."),
        (second(first(x)), "both residuals are missing: an adapter adds its update to what it gets."),
        (h + second(first(x)), "the second sees the first one's update alone; it should see x + first(x)."),
        (x + second(h), "the first adapter's own update got lost: the second adds to x + first(x)."),
        (h, "that is the first adapter alone."),
    )
    if not isinstance(found, Tensor) or found.shape != x.shape:
        raise Mistake("the answer has as many numbers as x.")
    for value, why in wrong:
        if torch.allclose(found, value, atol=1e-5):
            raise Mistake(why)
    if not torch.allclose(found, h + second(h), atol=1e-5):
        raise Mistake("it is neither the stack nor one of its usual relatives: name h = x + first(x), and go on from h.")
    return "the second adapter reads what the first has written, so their order matters."
