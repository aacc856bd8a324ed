"""Exercises of `02_lora_from_scratch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.attach import attach, parameters
from lora_nb.checks.exercises import Mistake, exercise, value_of
from lora_nb.configs import LoraConfig

N, IN, OUT, R, ALPHA = 5, 12, 7, 3, 6.0  # no two alike, so that a transposed shape shows
S = ALPHA / R


def _numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.detach().float(), b, rtol=1e-4, atol=1e-5)


def _tensor(value: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise Mistake(f"{name} is a {type(value).__name__}, not a tensor.")
    if tuple(value.shape) != shape:
        raise Mistake(f"{name} has shape {tuple(value.shape)}; it should be {shape}.")
    return value


@exercise(
    "02.1",
    "Your own LoraLinear",
    difficulty=2,
    minutes=20,
    hints=(
        "A: nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5); B: zeros of its own two sizes.",
        "forward: return self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.s",
    ),
)
def lora_linear(answer: Callable[..., Any]) -> str:
    """Start, output and gradients against the package's layer."""
    base = nn.Linear(IN, OUT)
    x, a, b = _numbers((2, N, IN), (R, IN), (OUT, R))
    layer = value_of(answer, base, R, ALPHA)
    value_of(layer, x)  # nothing yet?
    _starts_well(layer, base, x)
    with torch.no_grad():
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
    net = nn.Sequential(base)
    attach(net, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]))
    theirs = {name[-1]: p for name, p in parameters(net).items()}
    with torch.no_grad():
        theirs["A"].copy_(a)
        theirs["B"].copy_(b)
    y, right = layer(x), net(x)
    if not _same(y, right.detach()):
        raise Mistake(_wrong_output(y, base(x).detach(), right.detach()))
    y.square().sum().backward()
    right.square().sum().backward()
    for name, own in (("A", layer.lora_A), ("B", layer.lora_B)):
        if own.grad is None or not _same(own.grad, theirs[name].grad):  # type: ignore[arg-type]
            raise Mistake(f"the output is right, but the gradient of {name} does not arrive: is there a detach or no_grad on the way?")
    return "it starts as its base, and output and gradients agree with the package's layer."


def _starts_well(layer: Any, base: nn.Linear, x: Tensor) -> None:
    for name, shape in (("lora_A", (R, IN)), ("lora_B", (OUT, R))):
        p = getattr(layer, name, None)
        if not isinstance(p, nn.Parameter):
            raise Mistake(f"self.{name} is no nn.Parameter, so no optimizer would find it.")
        _tensor(p, f"self.{name}", shape)
    if base.weight.requires_grad:
        raise Mistake("the base trains: it should be frozen, base.requires_grad_(False).")
    if bool((layer.lora_A == 0).all()):
        raise Mistake("A is zero: then with B zero as well neither ever gets a gradient. A starts at random.")
    if bool((layer.lora_B != 0).any()):
        raise Mistake("B is not zero at the start, so the model would not start as it was.")
    _tensor(layer(x), "the output", (*x.shape[:-1], OUT))


def _wrong_output(y: Tensor, plain: Tensor, right: Tensor) -> str:
    update = right - plain
    if _same(y, plain):
        return "the output is the base's whatever A and B are: the update is missing."
    if _same(y, update):
        return "that is the update alone: the base's own output is missing."
    if _same(y - plain, update / S):
        return "the update lacks its factor, self.s."
    if _same(y - plain, update * S):
        return "the factor is applied twice."
    return "with A and B filled the output is not W x + s · B A x."


@exercise(
    "02.2",
    "Two gradients by hand",
    difficulty=3,
    minutes=20,
    hints=(
        "∂L/∂B is a sum over tokens of s · g (A x)ᵀ: with tokens in rows that is s * g.T @ (x @ A.T), of shape (outputs, r).",
        "∂L/∂A is a sum of s · (Bᵀ g) xᵀ: s * (g @ B).T @ x, of shape (r, inputs).",
    ),
)
def gradients_of(answer: Callable[..., Any]) -> str:
    """Against autograd."""
    x, g, a, b = _numbers((N, IN), (N, OUT), (R, IN), (OUT, R))
    value = value_of(answer, x, g, a, b, S)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Mistake("give back two tensors: return gradient_of_A, gradient_of_B.")
    if isinstance(value[0], Tensor) and tuple(value[0].shape) == (OUT, R):
        raise Mistake("the two are in the other order: first the gradient of A, then that of B.")
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    right = torch.autograd.grad((x @ leaves[0].T @ leaves[1].T * S * g).sum(), leaves)
    for name, own, theirs in zip("AB", value, right, strict=True):
        _tensor(own, f"the gradient of {name}", tuple(theirs.shape))
        if _same(own * S, theirs):
            raise Mistake(f"the gradient of {name} lacks the factor s.")
        if _same(own * N, theirs):
            raise Mistake(f"the gradient of {name} is the mean over tokens; it is their sum.")
        if not _same(own, theirs):
            raise Mistake(f"the gradient of {name} has the right shape and the wrong numbers.")
    return "both are autograd's, to rounding."


@exercise(
    "02.3",
    "The same factor at another rank",
    difficulty=2,
    minutes=5,
    hints=("The factor was α / r = 12 / 4. With rsLoRA it is α / √r.", "3 = α / √36, so α = 3 · 6."),
)
def same_factor(answer: Any) -> str:
    """α / √36 = 12 / 4."""
    likely = {
        108.0: "that is for the usual scale, α/r; rsLoRA divides by √r",
        12.0: "with the same α the factor would be 12 / √36 = 2",
        36.0: "rsLoRA's own factor at r = 4 would be 12 / √4 = 6; but the adapter had the usual scale",
        3.0: "that is the factor; which α gives it at r = 36?",
    }
    if not isinstance(answer, int | float) or isinstance(answer, bool):
        raise Mistake(f"the answer is a number here, and {type(answer).__name__} is none.")
    if not math.isclose(answer, 18):
        raise Mistake(likely.get(float(answer), f"{answer} / √36 is {answer / 6:g}, and the factor was 12 / 4 = 3") + ".")
    return "18 / √36 = 12 / 4 = 3."


@exercise(
    "02.4",
    "DoRA's output",
    difficulty=3,
    minutes=15,
    hints=(
        "V = W + s * B @ A is (outputs, inputs); a row belongs to one output: V.norm(dim=1) has their lengths.",
        "x @ V.T has tokens in rows and outputs in columns, so (m / V.norm(dim=1)) multiplies column by column.",
    ),
)
def dora_output(answer: Callable[..., Any]) -> str:
    """Against the equation."""
    x, w, a, b, m = _numbers((N, IN), (OUT, IN), (R, IN), (OUT, R), (OUT,))
    m = m.abs() + 1
    v = w + S * b @ a
    right = x @ v.T * (m / v.norm(dim=1))
    value = _tensor(value_of(answer, x, w, a, b, m, S), "the output", (N, OUT))
    likely = {
        "m multiplies, but nothing is divided by the rows' lengths": x @ v.T * m,
        "divided by the length of W's rows; the adapted matrix's are meant": x @ v.T * (m / w.norm(dim=1)),
        "the rows have length 1: m is missing": x @ v.T / v.norm(dim=1),
        "divided by the length of the whole matrix; each row has its own": x @ v.T * (m / v.norm()),
        "the update lacks its factor s": x @ (w + b @ a).T * (m / (w + b @ a).norm(dim=1)),
    }
    if not _same(value, right):
        raise Mistake(
            next((said for said, wrong in likely.items() if _same(value, wrong)), "the shape is right, the numbers are not") + "."
        )
    return "each row of the adapted matrix now has exactly the length m."
