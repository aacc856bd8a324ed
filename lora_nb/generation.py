"""Text from a model, with the active adapters, one by name, or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_nb.attach import acting
from lora_nb.datasets import start_ids
from lora_nb.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    *,
    adapter: str | None = None,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """What the model writes after each prompt, without the prompt; a list of prompts gives a list, in one batch.

    Args:
        adapter: let this adapter act alone; default: those that are active.
        temperature: 0 always takes the likeliest token; higher is freer.
        seed: of the drawing, when temperature is above 0.

    Raises:
        AdapterError: no adapter of that name.
        ConfigError: no prompt, a temperature below 0, or prompts that leave no room for new tokens.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"generate needs a prompt or a list of prompts, not {prompts!r}.")
    if temperature < 0 or max_new_tokens < 1:
        raise ConfigError(f"temperature={temperature!r}, max_new_tokens={max_new_tokens!r}: they must be at least 0 and at least 1.")
    rows = [[*start_ids(tokenizer), *tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]] for t in texts]
    longest, room = max(len(r) for r in rows), getattr(model.config, "max_position_embeddings", None)
    if room and longest + max_new_tokens > room:
        raise ConfigError(f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's {room} positions.")
    device = next(model.parameters()).device
    pad = int(tokenizer.pad_token_id or 0)
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)  # on the left: the new text follows the prompt
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    training = model.training
    model.eval()
    try:
        with nullcontext() if adapter is None else acting(model, [adapter]):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **drawing)  # type: ignore[operator]
    finally:
        model.train(training)
    new = [t.strip() for t in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]
    return new[0] if isinstance(prompts, str) else new
