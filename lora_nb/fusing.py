"""Blocks that are computed as `layers/fused.py` has them while a model trains: those that are known word for word.

Within `fused(model)` such modules have a `forward` beside that of their class. It asks at each call whether all is as it has to be:
gradients are wanted, everything is fp32, the base is frozen, the adapters are no more than s · B A, nothing is hooked into the
block. Else, and for generating, the class' own runs. That the two agree is tried once for each class, on a small block.

LoRA around a layer in four bits is one such block, too, in 16 bits on a GPU: `layers/lora_gpu.py` has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_nb.layers.adapted import AdaptedLayer
from lora_nb.layers.fused import GatedMlp, Low, RmsNorm, RotatedQkv
from lora_nb.layers.linear4bit import Linear4bit
from lora_nb.layers.lora import LoraWeights
from lora_nb.layers.lora_gpu import over_four_bits, suits_four_bits

MANY = 128  # tokens from which on it pays
SILU = {"SiLU", "SiLUActivation"}


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the `with` block the model's known blocks are quicker to train and keep less. A backward pass belongs within, too."""
    found = [(m, f) for m in model.modules() if "forward" not in vars(m) and (f := known(m)) is not None]
    for module, forward in found:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module, _ in found:
            vars(module).pop("forward", None)


def known(module: nn.Module) -> Callable[..., Any] | None:
    """The other `forward` of the module's class, if there is one and it computes the same."""
    if isinstance(module, AdaptedLayer):
        return linear4bit_forward if type(module.base) is Linear4bit else None
    kind = type(module)
    forward = FORWARDS.get(kind.__name__)
    if forward is None or not kind.__module__.startswith("transformers.models."):
        return None
    try:
        return forward if agrees(kind, forward) else None  # type: ignore[arg-type] # a class can be hashed
    except Exception:  # noqa: BLE001 - whatever a class that is not as we know it raises, its own forward is there
        return None


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Of `LlamaRMSNorm` and its like."""
    w = self.weight
    if is_wanted(hidden_states) and w.dtype == torch.float32 and not w.requires_grad:
        return RmsNorm.apply(hidden_states, w, self.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]
    return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """Of `LlamaMLP` and its like."""
    lows = lows_of(self, x, ("gate_proj", "up_proj", "down_proj"))
    if lows is None or type(self.act_fn).__name__ not in SILU or not is_bare(self.act_fn):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return GatedMlp.apply(x, *lows)  # type: ignore[no-any-return, no-untyped-call]


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """Of `LlamaAttention` and its like; what attends is the function that the model's config names, as ever."""
    lows = lows_of(self, hidden_states, ("q_proj", "k_proj", "v_proj"))
    if lows is None or past_key_values is not None or position_embeddings is None:
        own = type(self).forward
        return own(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    cos, sin = (t[..., None, : self.head_dim // 2] for t in position_embeddings)
    q, k, v = RotatedQkv.apply(hidden_states, torch.complex(cos, sin), *lows)  # type: ignore[no-untyped-call]
    home: Any = sys.modules[type(self).__module__]
    attend = home.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, home.eager_attention_forward)  # noqa: SLF001 - as transformers' own layers ask
    dropout = self.attention_dropout if self.training else 0.0
    kwargs |= {"sliding_window": WINDOWS[type(self).__name__](self)} if type(self).__name__ in WINDOWS else {}
    y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def linear4bit_forward(self: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
    """Of a layer in four bits with one adapter: none of x is copied for the adapter's sake."""
    part, base = lone(self), self.base
    if part is None or not torch.is_grad_enabled() or len(args) != 1 or kwargs or not (isinstance(base, Linear4bit) and is_bare(base)):
        return type(self).forward(self, *args, **kwargs)
    if not suits_four_bits(args[0], part.lora_A, base.compute_dtype):
        return type(self).forward(self, *args)
    dropout = part.dropout if part.training else 0.0
    return over_four_bits(args[0], base.quantized, base.bias, (part.lora_A, part.lora_B, part.scaling), dropout)


FORWARDS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"), norm_forward),
    **dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"), mlp_forward),
    **dict.fromkeys(("LlamaAttention", "MistralAttention", "Qwen2Attention"), attention_forward),
}
WINDOWS: dict[str, Callable[[Any], Any]] = {
    "MistralAttention": lambda self: getattr(self.config, "sliding_window", None),
    "Qwen2Attention": lambda self: self.sliding_window,
}


def is_wanted(x: Tensor) -> bool:
    """Whether gradients are, in fp32, and of enough tokens."""
    plain = torch.is_grad_enabled() and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return plain and x.ndim == 3 and x.shape[0] * x.shape[1] >= MANY and not torch.compiler.is_compiling()


def is_bare(module: nn.Module) -> bool:
    """Calling it does what its class says: no hooks, nothing in place of its `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)  # noqa: SLF001
    return not any(hooks) and "forward" not in vars(module)


def lows_of(block: nn.Module, x: Tensor, names: tuple[str, ...]) -> list[Any] | None:
    """The linear layers of that name as `Low`s laid out flat; None unless all are such."""
    if not is_wanted(x):
        return None
    lows = [low(block._modules.get(name)) for name in names]
    return None if None in lows else [value for found in lows for value in found or ()]


def low(layer: Any) -> Low | None:
    """A frozen linear layer in fp32 without an adapter, or with one that is s · B A; None for anything else."""
    base: Any = layer.base if isinstance(layer, AdaptedLayer) else layer
    if type(base) is not nn.Linear or not (is_bare(base) and is_bare(layer)):
        return None
    w, bias = base._parameters["weight"], base._parameters["bias"]
    if w is None or w.dtype != torch.float32 or w.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if base is layer or not (layer.active or layer.routing):
        return Low(w, bias, None, None, 1.0)
    part = lone(layer)
    if part is None or part.beside() or part.lora_A.dtype != torch.float32:
        return None
    return Low(w, bias, part.lora_A, part.lora_B, part.scaling)


def lone(layer: AdaptedLayer) -> LoraWeights | None:
    """The one adapter that acts in a layer, if that is s · B A, perhaps with dropout, and no more."""
    if len(layer.active) != 1 or layer.routing is not None:
        return None
    part = layer.adapters[layer.active[0]]
    return None if type(part) is not LoraWeights or part.replaces or part.more() else part


@cache
def agrees(kind: type[nn.Module], forward: Callable[..., Any]) -> bool:
    """Whether a small block of that class gives the same with this `forward`: in another version of transformers it may not."""
    home: Any = sys.modules[kind.__module__]
    family = kind.__name__.removesuffix("RMSNorm").removesuffix("MLP").removesuffix("Attention")
    with torch.random.fork_rng([]), torch.device("cpu"), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = getattr(home, f"{family}Config")(**sizes, hidden_act="silu", attn_implementation="eager")
        x = torch.randn(2, MANY, 16, dtype=torch.float32, requires_grad=True)
        more: dict[str, Any] = {}
        if forward is attention_forward:
            block = kind(config, 0)
            more["position_embeddings"] = getattr(home, f"{family}RotaryEmbedding")(config)(x, torch.arange(MANY)[None])
            more["attention_mask"] = torch.zeros(MANY, MANY).masked_fill(torch.ones(MANY, MANY).triu(1) > 0, -1e9)
        else:
            block = kind(16, eps=0.1) if forward is norm_forward else kind(config)
        block.float().requires_grad_(requires_grad=False)
        ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (f(block, x, **more) for f in (forward, kind.forward)))
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
