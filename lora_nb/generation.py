"""Text from a model, with the active adapters, one by name, or none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_nb.attach import acting
from lora_nb.blocks import start_ids
from lora_nb.errors import ConfigError
from lora_nb.routing import rows as mixed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    *,
    adapter: str | Sequence[str | None] | None = None,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """What the model writes after each prompt, without the prompt; a list of prompts gives a list, in one batch.

    Args:
        adapter: let this adapter act alone; with a list, each prompt has its own, or None for the base, in one batch. Default:
            those that are active.
        temperature: 0 always takes the likeliest token; higher is freer.
        seed: of the drawing, when temperature is above 0.

    Raises:
        AdapterError: no adapter of that name.
        ConfigError: no prompt, a temperature below 0, prompts that leave no room for new tokens, or not one adapter for each.

    Neither the caller's random numbers nor the model's own generation settings are touched.
    """
    from transformers import GenerationConfig

    base: Any = model
    rows = prompt_ids(tokenizer, prompts)
    longest = max(len(r) for r in rows)
    check_settings(base, longest, max_new_tokens, temperature)
    device = next(model.parameters()).device
    pad = int(tokenizer.pad_token_id or 0)
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)  # on the left: the new text follows the prompt
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    drawing: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    own, training = base.generation_config, model.training
    # Not the base's own taste: with its repetition penalty or top-p, temperature 0 would not be the likeliest token.
    stops = stop_tokens(base, tokenizer) or None
    plain = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=stops, **drawing)  # type: ignore[no-untyped-call]
    try:
        base.generation_config = plain
        model.eval()
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),  # the caller's random numbers go on undisturbed
            _with_adapter(model, adapter, len(rows)),
        ):
            torch.manual_seed(seed)
            out = base.generate(input_ids=ids, attention_mask=mask)
    finally:
        base.generation_config = own
        model.train(training)
    new = [t.strip() for t in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]
    return new[0] if isinstance(prompts, str) else new


def _with_adapter(model: nn.Module, adapter: str | Sequence[str | None] | None, count: int) -> AbstractContextManager[object]:
    """Within, what was asked for acts."""
    if adapter is None or isinstance(adapter, str):
        return nullcontext() if adapter is None else acting(model, [adapter])
    if len(adapter) != count:
        raise ConfigError(f"{len(adapter)} adapters for {count} prompts: give one adapter, or None for the base, for each prompt.")
    return mixed_rows(model, adapter)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: object) -> list[list[int]]:
    """Token ids of each prompt, with the token that begins a text.

    Raises:
        ConfigError: no prompt, or nothing to begin from.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else []
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"generate needs a prompt or a list of prompts, not {prompts!r}.")
    rows = [[*start_ids(tokenizer), *tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]] for t in texts]
    if not all(rows):
        raise ConfigError(
            "An empty prompt gives this model nothing to begin from, as its tokenizer has no begin-of-text token: write a word."
        )
    return rows


def check_settings(model: Any, longest: int, max_new_tokens: object, temperature: object) -> None:
    """Raise ConfigError unless a text can be written so after a prompt of so many tokens."""
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature!r}: it must be a number of at least 0.")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r}: it must be a whole number of at least 1.")
    room = getattr(model.config, "max_position_embeddings", None)
    if room and longest + max_new_tokens > room:
        raise ConfigError(
            f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's {room} positions: shorten one of them."
        )


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where text ends: at the token that training ends it with, and at whatever the base itself stops at."""
    own = model.generation_config.eos_token_id
    stops = own if isinstance(own, list) else [own]
    return sorted({int(s) for s in (*stops, tokenizer.eos_token_id) if s is not None})
