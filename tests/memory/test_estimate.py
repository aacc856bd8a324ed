"""The closed form, against the real model code run without weights, and against cases that a person can count."""

from collections.abc import Callable

import pytest
import transformers as T

import lora_nb as ln
from lora_nb.memory.estimate import estimate
from lora_nb.memory.report import Estimate
from lora_nb.memory.trace import trace_memory

LORA = ln.LoraConfig(r=8, lora_alpha=20)
SIZES = {"hidden_size": 96, "intermediate_size": 264, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 301}
EVEN = SIZES | {"num_key_value_heads": 6}
MADE: dict[str, Callable[[], T.PretrainedConfig]] = {
    "llama": lambda: T.LlamaConfig(**SIZES, num_hidden_layers=3),
    "qwen3": lambda: T.Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=24),
    "gemma2": lambda: T.Gemma2Config(**SIZES, num_hidden_layers=3, head_dim=24),
    "gemma3": lambda: T.Gemma3TextConfig(**SIZES, num_hidden_layers=3, head_dim=24),
    "phi": lambda: T.PhiConfig(**EVEN, num_hidden_layers=3),
    "phi3": lambda: T.Phi3Config(**SIZES, num_hidden_layers=3, pad_token_id=0),
    "mixtral": lambda: T.MixtralConfig(**SIZES, num_hidden_layers=3, num_local_experts=4),
    "falcon": lambda: T.FalconConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=3, vocab_size=301),
    "gpt_neox": lambda: T.GPTNeoXConfig(hidden_size=96, intermediate_size=264, num_attention_heads=6, num_hidden_layers=3, vocab_size=301),
    "gpt2": lambda: T.GPT2Config(n_embd=96, n_head=6, n_layer=3, vocab_size=301, bos_token_id=1, eos_token_id=1),
}


def grown(e: Estimate) -> int:
    """What comes on top of what is there before the step."""
    return e.total - sum(e.parts.get(name, 0) for name in ("weights", "adapters", "optimizer"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [LORA, "full"], ids=["lora", "full"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in {"llama", "gpt2"} else pytest.mark.slow) for k in MADE])
def test_a_step_takes_what_the_real_code_takes(kind: str, config: ln.LoraConfig | str, dtype: str) -> None:
    if kind == "mixtral" and dtype == "float32":
        pytest.skip("torch cannot run grouped products of fp32 without values")
    settings = {"batch_size": 2, "seq_len": 160, "dtype": dtype}
    traced = trace_memory(MADE[kind](), config, **settings)
    closed = estimate(MADE[kind](), config, **settings, device="cpu")
    assert grown(closed) == pytest.approx(grown(traced), rel=0.05)
    for part in ("weights", "adapters", "optimizer"):
        assert closed.parts.get(part, 0) == pytest.approx(traced.parts.get(part, 0), rel=0.01, abs=4096)
