"""Tiny random models from transformers' configs (no file, no network), and their twins under Hugging Face PEFT.

No size equals another where the architecture lets it differ, so that a transposed shape shows.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import peft
import torch
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_nb.attach import detach, weights
from lora_nb.configs import LoraConfig

VOCABULARY = 61
M = TypeVar("M", bound=nn.Module)


def tiny_llama(
    *, tied: bool = False, seed: int = 0, vocabulary: int = VOCABULARY, layers: int = 3, positions: int = 64, **more: float
) -> LlamaForCausalLM:
    """Grouped-query attention: q_proj 32 → 32, k_proj and v_proj 32 → 16. `more` goes into its config."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    return _made(LlamaForCausalLM, config, seed)


def tiny_gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    """Conv1D layers, fused c_attn 32 → 96, head tied to the embedding."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return _made(GPT2LMHeadModel, config, seed)


def tiny_falcon(*, seed: int = 0) -> FalconForCausalLM:
    """Its linear layers are a subclass of nn.Linear with a forward of its own."""
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=48,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _made(FalconForCausalLM, config, seed)


def tiny_bert(*, seed: int = 0) -> BertForMaskedLM:
    """An encoder; its embedding has a padding token."""
    return _made(BertForMaskedLM, _bert_config(), seed)


def tiny_bert_classifier(*, seed: int = 0) -> BertForSequenceClassification:
    """The encoder under a head of three classes, named `classifier`."""
    return _made(BertForSequenceClassification, _bert_config(), seed)


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=0,
    )


def _made(kind: Callable[[Any], M], config: object, seed: int) -> M:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def token_ids(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Tokens without the special ones, 0 to 2."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Random A and B for an attached adapter, as if it were trained: so that it changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for w in weights(model, name).values():
        for p in (w.lora_A, w.lora_B):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def peft_config(config: LoraConfig) -> peft.LoraConfig:
    """The same settings for PEFT: the fields have the same names."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return peft.LoraConfig(**{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})


def under_peft(model: nn.Module, config: LoraConfig) -> nn.Module:
    """PEFT's layers put into `model` itself, in place; they are as PEFT initialises them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out and warns of ties, both in words
        peft.inject_adapter_in_model(peft_config(config), model)
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=True)  # to fp32, as get_peft_model does
    return model


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's adapted layers by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def peft_parameters(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of one of PEFT's layers; an embedding keeps them elsewhere."""
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@torch.no_grad()
def peft_twin(model: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    """A copy of an adapted model in which PEFT computes what we do: the same base, the same A and B."""
    twin = copy.deepcopy(model)
    detach(twin)
    under_peft(twin, config)
    layers = peft_layers(twin)
    ours = weights(model, name)
    assert layers.keys() == ours.keys()
    for path, w in ours.items():
        for theirs, p in zip(peft_parameters(layers[path]), (w.lora_A, w.lora_B), strict=True):
            theirs.copy_(p)
    return twin.train(model.training)
