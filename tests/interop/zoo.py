"""The models of the table in `test_matrix.py`: tiny, random, made from transformers' configs; and a network without any config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models import VOCABULARY, tiny_bert, tiny_falcon, tiny_gpt2, tiny_llama, token_ids

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


class Cnn(nn.Module):
    """A strided convolution, a batch norm, two convolutions beside the stream, one of them without a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        stages = (nn.ModuleDict({"mix": nn.Conv2d(8, 8, 3, padding="same", bias=bias)}) for bias in (True, False))
        self.body = nn.ModuleDict({"stages": nn.ModuleList(stages)})
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images))
        for stage in self.body["stages"]:
            x = x + stage["mix"](x.relu())
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Kind:
    """How to make a model, and what to name in it: two kinds of layer, the embedding, a module to train whole, a parameter."""

    make_small: Callable[[], nn.Module]
    layers: tuple[str, str]
    embedding: str
    whole: str
    parameter: str
    task: str | None = "CAUSAL_LM"

    @torch.no_grad()
    def make(self) -> nn.Module:
        """The same each time, with weights large enough that each of its parts shows."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = self.make_small()
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(std=0.15)
        return model.eval()


def from_config(config: str, model: str, sizes: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


LAYERS = ("q_proj", "down_proj")
ZOO = {
    "llama": Kind(tiny_llama, LAYERS, "embed_tokens", "input_layernorm", "v_proj.weight"),
    "mistral": Kind(from_config("MistralConfig", "MistralForCausalLM", GROUPED), LAYERS, "embed_tokens", "lm_head", "o_proj.weight"),
    "falcon": Kind(tiny_falcon, ("query_key_value", "dense_4h_to_h"), "word_embeddings", "ln_f", "dense_h_to_4h.weight"),
    "gpt2": Kind(tiny_gpt2, ("c_attn", "c_fc"), "wte", "ln_f", "mlp.c_proj.weight"),
    "bert": Kind(tiny_bert, ("query", "intermediate.dense"), "word_embeddings", "attention.output.LayerNorm", "key.weight", None),
    "roberta": Kind(
        from_config("RobertaConfig", "RobertaForMaskedLM", SIZES | {"max_position_embeddings": 66}),
        ("value", "attention.output.dense"),
        "word_embeddings",
        "lm_head.dense",
        "query.weight",
        None,
    ),
    "t5": Kind(
        from_config("T5Config", "T5ForConditionalGeneration", T5),
        ("q", "wo"),
        "embed_tokens",
        "final_layer_norm",
        "k.weight",
        "SEQ_2_SEQ_LM",
    ),
    "qwen3": Kind(
        from_config("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 16}), LAYERS, "embed_tokens", "q_norm", "up_proj.weight"
    ),
    "gemma": Kind(
        from_config("GemmaConfig", "GemmaForCausalLM", GROUPED | {"head_dim": 16}),
        ("o_proj", "gate_proj"),
        "embed_tokens",
        "post_attention_layernorm",
        "k_proj.weight",
    ),
    "phi": Kind(from_config("PhiConfig", "PhiForCausalLM", GROUPED), ("v_proj", "fc1"), "embed_tokens", "final_layernorm", "fc2.weight"),
    "mixtral": Kind(
        from_config("MixtralConfig", "MixtralForCausalLM", GROUPED | {"intermediate_size": 24, "num_local_experts": 4}),
        ("k_proj", "o_proj"),
        "embed_tokens",
        "mlp.gate",
        "experts.gate_up_proj",
    ),
    "cnn": Kind(Cnn, ("mix", "head"), "stem", "norm", "head.weight", None),
}


def run(model: nn.Module) -> Tensor:
    """Logits of a small batch: of token ids, or of images where the model takes these."""
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return model(torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)))
    ids = token_ids()
    config = getattr(model, "config", None)
    more = {"decoder_input_ids": ids[:, :5]} if config is not None and getattr(config, "is_encoder_decoder", False) else {}
    return model(input_ids=ids, **more).logits
