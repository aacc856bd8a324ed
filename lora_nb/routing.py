"""Each row of a batch with an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_nb.attach import acting, adapters, layers
from lora_nb.errors import AdapterError, nearest
from lora_nb.layers.mixed import Routing


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the `with` block each row of a batch goes through its own adapter.

    Args:
        names: for each row the name of an attached adapter, or None for the base alone.

    What trains stays as it is, and gradients reach the adapters of the rows; call `backward` inside the block if the model
    checkpoints its activations, as it then computes them again. Adapters may not be attached, taken off or loaded meanwhile.

    Raises:
        AdapterError: no adapter of that name, or a batch with another number of rows.
    """
    with acting(model, ()), routed(model, Routing(known(model, names), device=next(model.parameters()).device)):
        yield model


@contextmanager
def routed(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Within the `with` block every adapted layer sends its rows where `routing` says."""
    before = [(layer, layer.routing) for _, layer in layers(model)]
    for layer, _ in before:
        layer.routing = routing
    try:
        yield
    finally:
        for layer, own in before:
            layer.routing = own


def known(model: nn.Module, names: Sequence[str | None]) -> list[str | None]:
    """The names as a list, each of them an adapter's or None.

    Raises:
        AdapterError: none at all, or one that the model does not carry.
    """
    wanted: list[str | None] = [names] if isinstance(names, str) else list(names)
    there = list(adapters(model).reports)
    if not wanted:
        raise AdapterError("No row is named: give one adapter, or None for the base, for each row of the batch.")
    for name in wanted:
        if name is not None and name not in there:
            raise AdapterError(f"The model has no adapter {name!r}." + (nearest(str(name), there) if there else " None is attached."))
    return wanted
