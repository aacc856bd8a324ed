"""Cross-entropy over the labels that count, chunk by chunk, so that the logits of all tokens never exist at once.

With the hidden state x_i (width) of token i, the head's weight W (vocabulary, width) and bias b, and the label y_i:

    z_i = W x_i + b,    L = Σ_i (log Σ_v exp z_iv − z_iy),    g_i = ∂L/∂z_i = softmax(z_i) − onehot(y_i),
    ∂L/∂x_i = Wᵀ g_i,   ∂L/∂W = Σ_i g_i x_iᵀ,   ∂L/∂b = Σ_i g_i

With a vocabulary of 128k, z takes half a megabyte a token in fp32, and the usual way holds it three times over. Here z of some
hundred tokens is made, turned into g in its own memory, multiplied by W at once, and dropped: what stays until the backward
pass is ∂L/∂x, no larger than x. Tokens without a label cost nothing. (Liger Kernel, arXiv:2410.10989, section 3.2, does so on GPUs.)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_nb.blocks import IGNORE
from lora_nb.layers.cross_entropy import loss_and_gradient
from lora_nb.layers.kernels import kernel

Called = TypeVar("Called", bound=Callable[..., Any])

# Logits at once. On a CPU 32 MiB of fp32, by measurement: with less, W is read too often; with more, all is done outside of the
# caches. A GPU needs some hundred rows to be busy, with any vocabulary.
CPU_CHUNK, GPU_CHUNK = 2**23, 2**26
PROBED = "lora_nb_head_found"  # where a model keeps whether `_agrees` held


def loss_sum(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """The loss of all labelled tokens together, in nats: an fp32 scalar with a gradient, which the training loop minimises.

    Args:
        input_ids, labels: (batch, seq); labels that are `IGNORE` do not count. Labels may stay on the CPU: their places are found
            where they are, and a GPU need not be waited for.
        position_ids: (batch, seq); where they start anew within a row, transformers' models begin another document (packing).
        attention_mask: as the model takes it, for example who sees whom, (batch, 1, seq, seq).

    The backbone runs whole, then the output head a chunk at a time; so what to compile is the backbone, `model.base_model.compile()`.
    A model that does not work that way, or that is compiled or wrapped as a whole, is called whole: the same loss, with all logits.
    """
    if not torch.is_grad_enabled():
        return predictions(model, input_ids, labels, position_ids, attention_mask)[0].sum()
    head = output_head(model, input_ids)
    if head is None:
        return token_losses(model, input_ids, labels, position_ids, attention_mask)[0].sum()
    hidden, goals = _labelled(_last_hidden(model, _inputs(input_ids, position_ids, attention_mask)), labels)
    total: Tensor = head.loss_sum(hidden, goals)
    return total


@torch.no_grad()
def predictions(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the n labelled tokens the loss (nats, fp32), the likeliest token, and the label, all (n,); for evaluation."""
    head = output_head(model, input_ids)
    if head is None:
        losses, logits, goals = token_losses(model, input_ids, labels, position_ids, attention_mask)
        return losses, logits.argmax(-1), goals
    hidden, goals = _labelled(_last_hidden(model, _inputs(input_ids, position_ids, attention_mask)), labels)
    parts: list[tuple[Tensor, Tensor]] = []
    for x, y in head.chunks(hidden, goals):
        logits = head(x)
        parts.append((F.cross_entropy(logits, y, reduction="none"), logits.argmax(-1)))
    return torch.cat([losses for losses, _ in parts]), torch.cat([guesses for _, guesses in parts]), goals


def token_losses(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain way, through the model's own `forward`, for any model that gives `.logits`.

    Returns:
        losses (n,) in nats and logits (n, vocabulary), fp32 and differentiable, and labels (n,) of the n labelled tokens.
    """
    logits, goals = _labelled(model(**_inputs(input_ids, position_ids, attention_mask)).logits, labels)
    logits = logits.float()
    return F.cross_entropy(logits, goals, reduction="none"), logits, goals


def _uncompiled(function: Called) -> Called:
    """`torch.compiler.disable` when it is called: the decorator imports the compiler, a second that most programs have no use for."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        return torch.compiler.disable(function)(*args)  # type: ignore[no-untyped-call]

    return cast("Called", call)


@dataclass(frozen=True)
class Head:
    """An output head as most architectures have it: x ↦ z = cap · tanh(scale · layer(x) / cap), or scale · layer(x) without a cap."""

    layer: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(n, width) → logits (n, vocabulary), fp32."""
        return self.shape(self.layer(hidden).float())

    def shape(self, z: Tensor) -> Tensor:
        z = z if self.scale == 1 else z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    def chunks(self, hidden: Tensor, goals: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states and their labels in pieces of like size, none with more logits than the device's share."""
        limit = CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
        count = max(1, -(-len(hidden) * self.vocabulary // limit))
        rows = max(1, -(-len(hidden) // count))
        return zip(torch.split(hidden, rows), torch.split(goals, rows), strict=True)

    @property
    def vocabulary(self) -> int:
        return int(self.layer.out_features)  # type: ignore[arg-type]

    @_uncompiled  # each number of labels would be compiled anew
    def loss_sum(self, hidden: Tensor, goals: Tensor) -> Tensor:
        """Σ loss over (n, width) hidden states and (n,) labels."""
        if _is_plain(self.layer):
            return LinearLoss.apply(hidden, self.layer.weight, self.layer.bias, goals, self)  # type: ignore[no-any-return, no-untyped-call]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self(x), y, reduction="sum")

        # Whatever an adapted, quantized or hooked layer does, it does to each chunk, once more on the way back.
        return torch.stack([checkpoint(loss, x, y, use_reentrant=False) for x, y in self.chunks(hidden, goals)]).sum()


class LinearLoss(torch.autograd.Function):
    """Σ loss behind a plain linear head; both passes of a chunk are done while its logits exist (mathematics: head of this file).

    The gradient is computed on the way forward, as that of a sum does not depend on what comes after but for a factor, so no
    product is computed twice. W and b get one only where they train; W's is summed in fp32.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, goals: Tensor, head: Head
    ) -> Tensor:
        wanted = [t if need else None for t, need in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)]
        dx, dW, db = (None if t is None else torch.zeros_like(t, dtype=torch.float32 if i else t.dtype) for i, t in enumerate(wanted))
        device, total = hidden.device.type, torch.zeros((), dtype=torch.float32, device=hidden.device)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        W, b = weight.to(dtype), None if bias is None else bias.to(dtype)  # once, where autocast would convert W for each chunk
        at, fast = 0, kernel("cross_entropy_triton", hidden.device)
        with torch.autocast(device, enabled=False):
            for x, y in head.chunks(hidden.to(dtype), goals):
                if fast is not None:
                    loss, g = fast.loss_and_gradient(F.linear(x, W, b), y, head.scale, head.cap)
                else:
                    loss, g = loss_and_gradient(F.linear(x, W, b).float(), y, head.scale, head.cap)
                total += loss
                if db is not None:
                    db += g.sum(0, dtype=torch.float32)
                g = g.to(dtype)
                if dx is not None:
                    dx[at : at + len(x)] = g @ W
                if dW is not None:
                    dW += g.mT @ x
                at += len(x)
        ctx.save_for_backward(dx, None if dW is None else dW.to(weight.dtype), None if db is None or bias is None else db.to(bias.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if grad is None else grad * factor.to(grad.dtype) for grad in ctx.saved_tensors), None, None


def _last_hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(batch, seq, width), as the backbone gives them."""
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden


def _labelled(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (batch, seq, width) after which a labelled token follows, (n, width), and these labels, (n,)."""
    goals = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # the token at t is predicted from those before it
    places = (goals != IGNORE).nonzero()[:, 0]
    device = values.device
    return values.flatten(0, 1).index_select(0, places.to(device, non_blocking=True)), goals[places].to(device, non_blocking=True)


def _inputs(input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Not every architecture knows all of them: they are passed where they are given."""
    given = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask, "use_cache": False}
    return {name: value for name, value in given.items() if value is not None}


def output_head(model: nn.Module, input_ids: Tensor) -> Head | None:
    """The model's output head, if its logits are what that makes of the backbone's last hidden state; else None.

    The first time that is tried on a few tokens of `input_ids`, and what was found is kept on the model.
    """
    if _runs_whole(model):
        return None
    base: Any = model
    layer = base.get_output_embeddings()
    sharded = layer is not None and any(hasattr(p, "full_tensor") for p in layer.parameters())  # FSDP: whole only within model.forward
    if sharded or not hasattr(layer, "out_features"):
        return None
    config = base.config
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)  # Gemma; Cohere
    head = Head(layer, scale or 1 / (getattr(config, "logits_scaling", None) or 1), cap)  # Granite
    if PROBED not in vars(model):
        setattr(model, PROBED, _agrees(model, head, input_ids[:1, :8]))
    return head if vars(model)[PROBED] else None


def _runs_whole(model: nn.Module) -> bool:
    """Only its own forward is right: wrapped (DDP), compiled or hooked as a whole, or no model of transformers that has a head."""
    if not hasattr(model, "get_output_embeddings") or getattr(model, "base_model", model) is model:
        return True
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None or _is_hooked(model)  # noqa: SLF001 - torch cannot be asked


def _is_hooked(module: nn.Module) -> bool:
    """Calling it does more than its class says: hooks, or accelerate's forward in place of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks) or "forward" in vars(module)


def _is_plain(layer: nn.Module) -> bool:
    """A linear layer and nothing else: not adapted, not quantized, nothing hooked on."""
    return type(layer) is nn.Linear and not _is_hooked(layer)


@_uncompiled
@torch.no_grad()
def _agrees(model: Any, head: Head, input_ids: Tensor) -> bool:
    """Do backbone and head give the model's own logits? Tried on outputs of up to ±100, so that a cap or its absence shows."""
    modes = {m: m.training for m in model.modules()}
    model.eval()  # the two would draw different dropout
    try:
        hidden = getattr(model.base_model(**_inputs(input_ids)), "last_hidden_state", None)
        if hidden is None:
            return False
        gain = 100 / head.layer(hidden).abs().max()
        hook = head.layer.register_forward_hook(lambda _module, _inputs, z: z * gain)
        try:
            ours, own = head(hidden), model(**_inputs(input_ids)).logits
        finally:
            hook.remove()
    finally:
        for m, mode in modes.items():
            m.training = mode
    rounding = 1e-4 if own.dtype == torch.float32 else 2e-2
    return ours.shape == own.shape and bool((ours - own.float()).abs().max() <= rounding * own.abs().max())
