"""How the model computes while it trains, and as it did before when that is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lora_nb.configs import TrainConfig
from lora_nb.errors import TrainingError
from lora_nb.fusing import fused


@contextmanager
def prepared(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """The config's `gradient_checkpointing` and `compile`; without the latter, which fuses on its own, known blocks are fused."""
    with ExitStack() as stack:
        stack.enter_context(checkpointing(model, wanted=config.gradient_checkpointing))
        if config.compile:
            stack.enter_context(_compiled(model))
        else:
            stack.enter_context(fused(model))
        yield


@contextmanager
def checkpointing(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Each layer is computed again on the way back instead of being kept (Chen et al., 2016, arXiv:1604.06174).

    Not in the reentrant way, which sees no gradient to compute where the embeddings before the layers are frozen.

    Raises:
        TrainingError: the model has no layers that transformers could treat so.
    """
    base: Any = model
    # transformers 5 renames "gradient" to "activation" on the way; both mean the same.
    new = hasattr(base, "activation_checkpointing_enable")
    on, off, is_on = (
        ("activation_checkpointing_enable", "activation_checkpointing_disable", "is_activation_checkpointing")
        if new
        else ("gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing")
    )
    if not wanted or getattr(base, is_on, False):  # the user's own is left as it is
        yield
        return
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise TrainingError(
            f"gradient_checkpointing=True: {type(model).__name__} is no model of transformers that can do so. Leave it False, and take a "
            "smaller batch_size with more gradient_accumulation_steps."
        )
    getattr(base, on)({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(base, off)()


@contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    """The backbone, whose output goes through the chunked loss; a model without one as a whole."""
    inner: nn.Module = getattr(model, "base_model", model)
    before = inner._compiled_call_impl  # noqa: SLF001 - compile() has no other way back
    inner.compile()
    try:
        yield
    finally:
        inner._compiled_call_impl = before  # noqa: SLF001
