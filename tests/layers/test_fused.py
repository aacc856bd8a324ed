"""The blocks' own forward and backward passes are those of their formulas, and keep less than autograd would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lora_nb.layers.fused import GatedMlp, RmsNorm, RotatedQkv

WIDTH, INNER, HEAD, S = 12, 20, 4, 2.5  # two heads of q, one of k and of v
WITHOUT = {"all adapted": (), "one is not": (1,), "none is": (0, 1, 2)}


def an_input(rows: int = 3, seq: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, seq, WIDTH, dtype=dtype, requires_grad=True)


def lows(
    shapes: list[tuple[int, int]], without: tuple[int, ...], *, bias: bool, r: int = 3, dtype: torch.dtype = torch.float64
) -> list[Any]:
    """(W, bias, A, B, s) of each of these shapes (out, in), laid out flat; s differs from layer to layer."""
    torch.manual_seed(1)
    out: list[Any] = []
    for i, (rows, columns) in enumerate(shapes):
        a, b = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((r + i, columns), (rows, r + i)))
        w, c = torch.randn(rows, columns, dtype=dtype), torch.randn(rows, dtype=dtype) if bias else None
        out += [w, c, None, None, 1.0] if i in without else [w, c, a, b, S + i]
    return out


def linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, s: float) -> Tensor:  # noqa: PLR0917 - as a `Low` is
    y = F.linear(x, w, bias)
    return y if a is None or b is None else y + s * (x @ a.T @ b.T)


def mlp(x: Tensor, *flat: Any) -> Tensor:
    return linear(F.silu(linear(x, *flat[:5])) * linear(x, *flat[5:10]), *flat[10:])


def rotations(seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """e^{iθ} as RotatedQkv takes it, and cos and sin (seq, HEAD) as transformers has them."""
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    return torch.polar(torch.ones_like(angles), angles)[None, :, None], cos, sin


def scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What attention makes of q and k: the inner products of each pair of positions."""
    return q @ k.repeat_interleave(2, 1).mT, v


def rotated(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """As transformers writes it (`rotate_half`)."""
    q, k, v = (linear(x, *flat[i : i + 5]).unflatten(2, (-1, HEAD)).transpose(1, 2) for i in (0, 5, 10))
    _, cos, sin = rotations(x.shape[1])
    q, k = (t * cos + torch.cat((-t[..., HEAD // 2 :], t[..., : HEAD // 2]), -1) * sin for t in (q, k))
    return scores(q, k, v)


def ours_rotated(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    return scores(*RotatedQkv.apply(x, rotations(x.shape[1])[0], *flat))


def assert_same(ours: Callable[..., Any], theirs: Callable[..., Any], x: Tensor, flat: list[Any]) -> None:
    leaves = [t for t in (x, *flat) if isinstance(t, Tensor) and t.requires_grad]
    found = []
    for function in (ours, theirs):
        y = function(x, *flat)
        ys = y if isinstance(y, tuple) else (y,)
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in ys)
        found.append([*ys, *(torch.autograd.grad(loss, leaves) if leaves else ())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 120])  # 600 tokens: several parts
def test_the_mlp_is_its_formula(without: tuple[int, ...], bias: bool, rows: int) -> None:
    flat = lows([(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)], without, bias=bias)
    assert_same(GatedMlp.apply, mlp, an_input(rows), flat)
    assert_same(GatedMlp.apply, mlp, an_input(rows).detach(), flat) if len(without) < 3 else None


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 120])
def test_q_k_and_v_give_the_same_scores(without: tuple[int, ...], bias: bool, rows: int) -> None:
    flat = lows([(2 * HEAD, WIDTH), (HEAD, WIDTH), (HEAD, WIDTH)], without, bias=bias)
    assert_same(ours_rotated, rotated, an_input(rows), flat)
    assert_same(ours_rotated, rotated, an_input(rows).detach(), flat) if len(without) < 3 else None


def test_the_norm_is_its_formula() -> None:
    w = torch.randn(WIDTH, dtype=torch.float64)
    assert_same(lambda x: RmsNorm.apply(x, w, 0.1), lambda x: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1), an_input(), [])


def test_gradients_are_those_of_finite_differences() -> None:
    x = an_input(1, 3)
    assert torch.autograd.gradcheck(GatedMlp.apply, (x, *lows([(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)], (), bias=True)))
    assert torch.autograd.gradcheck(RmsNorm.apply, (x, torch.randn(WIDTH, dtype=torch.float64), 0.1))
    heads = lows([(2 * HEAD, WIDTH), (HEAD, WIDTH), (HEAD, WIDTH)], (), bias=True)
    assert torch.autograd.gradcheck(RotatedQkv.apply, (x, rotations(3)[0], *heads))


def kept(run: Callable[[], object], but: list[Any]) -> int:
    """Numbers kept for the backward pass, each piece of memory once, those in `but` aside."""
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        run()
    known = {t.untyped_storage().data_ptr() for t in but if isinstance(t, Tensor)}
    return sum(size for at, size in found.items() if at not in known)


def test_the_mlp_keeps_two_of_its_inner_tensors_where_autograd_keeps_four() -> None:
    x, flat = an_input(20), lows([(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)], (), bias=False)
    tokens, ranks = 100, 3 + 4 + 5
    assert kept(lambda: GatedMlp.apply(x, *flat), [x, *flat]) == tokens * (2 * INNER + ranks)
    assert kept(lambda: mlp(x, *flat), [x, *flat]) >= tokens * (4 * INNER + ranks)
