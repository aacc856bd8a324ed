"""A layer with adapters around it: what every method of this package has in common.

A base layer f gets a stack of parts, one for each adapter. The active ones act from the first to the last, each around
what lies beneath it:

    y = part_n(… part_2(part_1(f))) (x)

LoRA's parts add to what comes from beneath, so their order makes no difference; a bottleneck reads it, so there it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

Forward = Callable[..., Any]


class Part(nn.Module):
    """What one adapter does at one layer; by itself nothing.

    `whole` has parameters of the base, by name, that this adapter has copies of its own of: biases (`bias="all"`), or
    everything (`modules_to_save`), then with the base's buffers in `kept`. While the adapter acts they stand in for the
    base's. `replaces` says whether there are such.
    """

    r: int = 0
    scaling: float = 1.0

    def __init__(self, whole: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.whole, self.kept, self.replaces = nn.ParameterDict(), nn.Module(), bool(whole)
        for name, p in (whole or {}).items():
            copy = torch.empty(p.shape, dtype=p.dtype)
            if isinstance(p, nn.Parameter):
                self.whole[name] = nn.Parameter(copy)
            else:
                self.kept.register_buffer(name, copy)

    @torch.no_grad()
    def reset(self, layer: AdaptedLayer, init: bool | str = True) -> None:
        """Set the values to start from."""
        for name, copy in self.copies().items():
            copy.copy_(getattr(layer, name))

    def copies(self) -> dict[str, Tensor]:
        """What stands in for the base's, by name."""
        return {**self.whole, **dict(self.kept.named_buffers())}

    def forward(self, layer: AdaptedLayer, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives with this adapter; `inner` is what it gives without."""
        return inner(*args, **kwargs)

    def substitute(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        """Put into `values` what stands in for the base's parameters while this adapter acts."""
        values.update(self.copies())

    def merge(self, layer: AdaptedLayer, values: dict[str, Tensor]) -> None:
        """Change `values`, the base's parameters by name, to those that give the same output without the adapter.

        Raises:
            TypeError: no weights of the base can do that.
        """
        self.substitute(layer, values)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it: end of the key in Hugging Face PEFT's format → parameter."""
        return {f".{name}": p for name, p in self.copies().items()}

    def saved(self) -> dict[str, Tensor]:
        """What to write under these keys, where that is not the parameters as they are."""
        return self.tensors()

    def delta(self) -> Tensor:
        """The update of the base's weight as a matrix (out, fan-in), for parts that are one."""
        raise TypeError(f"{type(self).__name__} is no update of a weight")


class AdaptedLayer(nn.Module):
    """Stands where the base stood and shares the base's own table of parameters.

    So names in the state dict, tied weights, `.to()` and whatever else reaches for `weight` find what they found before.
    The base itself is kept beside the module tree, unregistered, and is put back by `detach`.
    """

    base: nn.Module
    adapters: nn.ModuleDict
    active: tuple[str, ...]
    routing: Any = None  # whose the rows of a mixed batch are (`mixed.py`); None: all rows go through what is active

    def __init__(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["base"] = base
        self._parameters, self._buffers = base._parameters, base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        self._modules.update(base._modules)
        self.training = base.training
        self.adapters = nn.ModuleDict().train(base.training)
        self.active = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)  # in_features, padding_idx, quant_state, …

    def __setattr__(self, name: str, value: Any) -> None:
        """A child that is replaced here, by another adapter's layer for example, is replaced in the base as well."""
        super().__setattr__(name, value)
        base = self.__dict__.get("base")
        if base is not None and name in base._modules:
            base._modules[name] = self._modules[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing is not None:
            return self.routing.forward(self, *args, **kwargs)
        return through(self, args, kwargs)

    def train(self, mode: bool = True) -> Self:
        """The base too, which is out of the tree: it may be a dropout."""
        self.__dict__["base"].training = mode
        return super().train(mode)

    def value(self, name: str) -> Tensor | None:
        """The parameter that acts under that name: the base's, or an active adapter's own copy."""
        own = [self.adapters[n].whole[name] for n in self.active if name in self.adapters[n].whole]  # type: ignore[operator,index]
        return own[-1] if own else self._parameters.get(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As the base does it: a layer of four bits has keys of its own making."""
        self.base._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        own = {key: t for key, t in state_dict.items() if not key.startswith(f"{prefix}adapters.")}
        self.base._load_from_state_dict(own, prefix, *args)

    def extra_repr(self) -> str:
        return self.base.extra_repr()

    def add(self, name: str, part: Part, init: bool | str = True) -> Part:
        """Take in an adapter's part, set to where training starts, on the base's device; it does not act yet."""
        device = next((p.device for p in self._parameters.values() if p is not None), None)
        self.adapters[name] = part.to(device).train(self.training)  # no dropout on a model in eval mode
        part.reset(self, init)
        return part


def through(layer: AdaptedLayer, args: Any, kwargs: Any) -> Any:
    """The layer with the adapters that are active in it."""
    active = layer.active
    if not active:
        return layer.base(*args, **kwargs)
    there: Any = layer._modules["adapters"]  # past nn.Module's look-ups, which cost as much as a small product
    first: Part = there._modules[active[0]]
    if len(active) == 1 and not first.replaces:
        return first.forward(layer, layer.base, *args, **kwargs)
    acting: list[Part] = [there._modules[name] for name in active]
    values: dict[str, Tensor] = {}
    for part in acting:
        if part.replaces:
            part.substitute(layer, values)
    call: Forward = partial(_with, layer.base, values) if values else layer.base
    for part in acting:
        call = partial(part, layer, call)
    return call(*args, **kwargs)


def _with(base: nn.Module, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(base, values, args, kwargs)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """`nn.Linear`, W (out, in), with adapters."""


class AdaptedEmbedding(AdaptedLayer, nn.Embedding):
    """`nn.Embedding`, W (vocabulary, width), with adapters."""


class AdaptedConv1d(AdaptedLayer, nn.Conv1d):
    """`nn.Conv1d`, W (out, in/groups, k), with adapters."""


class AdaptedConv2d(AdaptedLayer, nn.Conv2d):
    """`nn.Conv2d`, W (out, in/groups, k, k), with adapters."""


class AdaptedConv3d(AdaptedLayer, nn.Conv3d):
    """`nn.Conv3d`, W (out, in/groups, k, k, k), with adapters."""


def adapted(module: nn.Module) -> AdaptedLayer:
    """The layer to put in the place of `module`: of a class that `isinstance` knows as the base's, where torch has one."""
    if isinstance(module, AdaptedLayer):
        return module
    for kind in (AdaptedLinear, AdaptedEmbedding, AdaptedConv1d, AdaptedConv2d, AdaptedConv3d):
        if isinstance(module, kind.__mro__[2]):
            return kind(module)
    return AdaptedLayer(module)
