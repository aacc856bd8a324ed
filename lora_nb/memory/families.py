"""How the configs of transformers' architectures say their numbers; whatever they leave out has transformers' own default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_nb.errors import ConfigError, nearest
from lora_nb.memory.shapes import Linear, Shape, Stack

Config = Mapping[str, Any]
LARGEST = 1 << 24  # no size of a model that exists comes near


def read(config: Config, name: str = "") -> Shape:
    """The shape that a config of transformers describes.

    Raises:
        ConfigError: an architecture that is not known here, or sizes that no model can have.
    """
    kind = str(config.get("model_type", ""))
    family = FAMILIES.get(kind)
    if family is None:
        raise ConfigError(
            f"estimate does not know the architecture {kind or 'of a config without model_type'!r}. trace_memory runs the model's own "
            "code without weights and takes any." + nearest(kind, FAMILIES)
        )
    return family(config, name or str(config.get("_name_or_path") or kind), kind)


def size(config: Config, name: str, default: int | None = None, least: int = 1) -> int:
    """One of the config's numbers.

    Raises:
        ConfigError: it is missing, no whole number, or out of reason.
    """
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        raise ConfigError(f"The config's {name} is {value!r}: it must be a whole number from {least} to {LARGEST}.")
    return value


def heads(config: Config, name: str, kv_name: str, width: int, default_kv: int | None = None) -> tuple[int, int, int]:
    """(heads, key and value heads, width of a head).

    Raises:
        ConfigError: they do not divide.
    """
    count = size(config, name)
    kv = size(config, kv_name, default_kv or count)
    head_dim = config.get("head_dim")
    if head_dim is None and width % count:
        raise ConfigError(f"The config has {count} heads at a width of {width}, which they do not divide: one of the two is wrong.")
    if count % kv:
        raise ConfigError(f"The config has {count} heads for {kv} key and value heads, a number that must divide them.")
    return count, kv, size(config, "head_dim") if head_dim is not None else width // count


def gated_decoder(config: Config, name: str, kind: str) -> Shape:
    """Llama and its descendants: norms by the root mean square, q, k, v and o apart, a gated MLP."""
    gemma, width = kind.startswith("gemma"), size(config, "hidden_size")
    inner, layers, vocabulary = size(config, "intermediate_size"), size(config, "num_hidden_layers"), size(config, "vocab_size")
    count, kv, head_dim = heads(config, "num_attention_heads", "num_key_value_heads", width)
    q, k, around = count * head_dim, kv * head_dim, kind in {"gemma2", "gemma3_text"}
    qk_norm = kind in {"qwen3", "qwen3_moe", "gemma3_text"}
    biased = kind == "qwen2" or bool(config.get("attention_bias"))
    projections = [("q_proj", width, q, biased), ("k_proj", width, k, biased), ("v_proj", width, k, biased)]
    out_biased, mlp_biased = bool(config.get("attention_bias")) and kind != "qwen2", bool(config.get("mlp_bias"))
    linears = [Linear(f"self_attn.{n}", i, o, b) for n, i, o, b in [*projections, ("o_proj", q, width, out_biased)]]
    experts = _experts(config, kind)
    if kind == "phi3":
        linears = [Linear("self_attn.qkv_proj", width, q + 2 * k), Linear("self_attn.o_proj", q, width)]
        linears += [Linear("mlp.gate_up_proj", width, 2 * inner), Linear("mlp.down_proj", inner, width)]
    elif experts == (1, 1):
        linears += [Linear(f"mlp.{n}_proj", width, inner, mlp_biased) for n in ("gate", "up")]
        linears += [Linear("mlp.down_proj", inner, width, mlp_biased)]
    if kind == "qwen3_moe":
        inner = size(config, "moe_intermediate_size")
    expert_parameters = experts[0] * 3 * width * inner if experts != (1, 1) else 0
    router = experts[0] * width if experts != (1, 1) else 0
    others = width * (4 if around else 2) + (2 * head_dim if qk_norm else 0) + router
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        kv,
        head_dim,
        vocabulary,
        (Stack("model.layers", layers, tuple(linears), others, expert_parameters),),
        vocabulary * width,
        Linear("lm_head", width, vocabulary),
        bool(config.get("tie_word_embeddings", gemma)),
        width,
        order="around" if around else "pre",
        norm="gemma" if gemma else "rms",
        qk_norm=qk_norm,
        activation="gelu" if gemma else str(config.get("hidden_act") or "silu"),
        fused="qkv+gate" if kind == "phi3" else "none",
        rotary="part" if kind == "phi3" else "whole",
        attention="eager" if kind == "gemma2" else "flash",
        attention_cap=kind == "gemma2",
        logit_cap=bool(config.get("final_logit_softcapping", kind == "gemma2")),
        experts=experts,
    )


def _experts(config: Config, kind: str) -> tuple[int, int]:
    if kind not in {"mixtral", "qwen3_moe"}:
        return 1, 1
    count = size(config, "num_local_experts" if kind == "mixtral" and "num_experts" not in config else "num_experts")
    return count, size(config, "num_experts_per_tok")


def phi(config: Config, name: str, kind: str) -> Shape:
    """Phi 1 to 2: attention and MLP side by side behind one norm, biases everywhere."""
    width, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    vocabulary, layers = size(config, "vocab_size"), size(config, "num_hidden_layers")
    count, kv, head_dim = heads(config, "num_attention_heads", "num_key_value_heads", width)
    q, k = count * head_dim, kv * head_dim
    sizes = [("self_attn.q_proj", width, q), ("self_attn.k_proj", width, k), ("self_attn.v_proj", width, k), ("self_attn.dense", q, width)]
    linears = tuple(Linear(n, i, o, bias=True) for n, i, o in [*sizes, ("mlp.fc1", width, inner), ("mlp.fc2", inner, width)])
    dropouts = (_share(config, "resid_pdrop", 0.0), _share(config, "attention_dropout", 0.0))
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        kv,
        head_dim,
        vocabulary,
        (Stack("model.layers", layers, linears, 2 * width),),
        vocabulary * width,
        Linear("lm_head", width, vocabulary, bias=True),
        bool(config.get("tie_word_embeddings", False)),
        2 * width,
        order="beside",
        norm="layer",
        activation=str(config.get("hidden_act") or "gelu_new"),
        gated=False,
        dropouts=dropouts,
        rotary="part",
    )


def falcon(config: Config, name: str, kind: str) -> Shape:
    """Falcon 7B (one norm) and 40B (two): attention and MLP side by side, q, k and v in one."""
    width, layers, vocabulary = size(config, "hidden_size"), size(config, "num_hidden_layers"), size(config, "vocab_size")
    new, many = bool(config.get("new_decoder_architecture")), bool(config.get("multi_query", True))
    count, kv, head_dim = heads(
        config, "num_attention_heads", "num_kv_heads" if new else "-", width, default_kv=1 if many and not new else None
    )
    if not config.get("parallel_attn", True) and not new:
        raise ConfigError("estimate does not know Falcon with parallel_attn=False: use trace_memory.")
    inner, bias = size(config, "ffn_hidden_size", 4 * width), bool(config.get("bias"))
    sizes = [("self_attention.query_key_value", width, (count + 2 * kv) * head_dim), ("self_attention.dense", count * head_dim, width)]
    sizes += [("mlp.dense_h_to_4h", width, inner), ("mlp.dense_4h_to_h", inner, width)]
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        kv,
        head_dim,
        vocabulary,
        (Stack("transformer.h", layers, tuple(Linear(n, i, o, bias) for n, i, o in sizes), (4 if new else 2) * width),),
        vocabulary * width,
        Linear("lm_head", width, vocabulary),
        bool(config.get("tie_word_embeddings", True)),
        2 * width,
        order="beside-two" if new else "beside",
        attention="flash" if kv == count or new else "math",
        repeats=new,
        norm="layer",
        activation="gelu",
        gated=False,
        fused="qkv",
        dropouts=(_share(config, "hidden_dropout", 0.0), _share(config, "attention_dropout", 0.0)),
    )


def gpt_neox(config: Config, name: str, kind: str) -> Shape:
    """Pythia and the first StableLM: attention and MLP side by side behind a norm each."""
    width, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    vocabulary, layers = size(config, "vocab_size"), size(config, "num_hidden_layers")
    count, kv, head_dim = heads(config, "num_attention_heads", "-", width)
    sizes = [("attention.query_key_value", width, 3 * width), ("attention.dense", width, width)]
    sizes += [("mlp.dense_h_to_4h", width, inner), ("mlp.dense_4h_to_h", inner, width)]
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        kv,
        head_dim,
        vocabulary,
        (Stack("gpt_neox.layers", layers, tuple(Linear(n, i, o, bias=True) for n, i, o in sizes), 4 * width),),
        vocabulary * width,
        Linear("embed_out", width, vocabulary),
        bool(config.get("tie_word_embeddings", False)),
        2 * width,
        order="beside-two" if config.get("use_parallel_residual", True) else "pre",
        rotary="part",
        norm="layer",
        activation="gelu",
        gated=False,
        fused="qkv",
        dropouts=(_share(config, "hidden_dropout", 0.0), _share(config, "attention_dropout", 0.0)),
    )


def gpt2(config: Config, name: str, kind: str) -> Shape:
    """GPT-2: norms before, q, k and v in one, a learned vector for each position."""
    width, layers, vocabulary = size(config, "n_embd"), size(config, "n_layer"), size(config, "vocab_size")
    inner, positions = size(config, "n_inner", 4 * width), size(config, "n_positions", 1024)
    count, kv, head_dim = heads(config, "n_head", "-", width)
    sizes = [("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width), ("mlp.c_fc", width, inner), ("mlp.c_proj", inner, width)]
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        kv,
        head_dim,
        vocabulary,
        (Stack("transformer.h", layers, tuple(Linear(n, i, o, bias=True) for n, i, o in sizes), 4 * width),),
        (vocabulary + positions) * width,
        Linear("lm_head", width, vocabulary),
        bool(config.get("tie_word_embeddings", True)),
        2 * width,
        norm="layer",
        activation=str(config.get("activation_function") or "gelu_new"),
        rotary="no",
        gated=False,
        fused="qkv",
        dropouts=(_share(config, "resid_pdrop", 0.1), _share(config, "attn_pdrop", 0.1)),
    )


def encoder(config: Config, name: str, kind: str) -> Shape:
    """BERT and RoBERTa with their head for masked words: norms behind each sum."""
    width, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    layers, vocabulary = size(config, "num_hidden_layers"), size(config, "vocab_size")
    positions, types = size(config, "max_position_embeddings"), size(config, "type_vocab_size", 2)
    count, kv, head_dim = heads(config, "num_attention_heads", "-", width)
    sizes = [(f"attention.self.{n}", width, width) for n in ("query", "key", "value")]
    sizes += [("attention.output.dense", width, width), ("intermediate.dense", width, inner), ("output.dense", inner, width)]
    path = "roberta.encoder.layer" if kind == "roberta" else "bert.encoder.layer"
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        kv,
        head_dim,
        vocabulary,
        (Stack(path, layers, tuple(Linear(n, i, o, bias=True) for n, i, o in sizes), 4 * width),),
        (vocabulary + positions + types) * width + 2 * width,  # and the norm behind their sum
        Linear("lm_head.decoder" if kind == "roberta" else "cls.predictions.decoder", width, vocabulary, bias=True),
        bool(config.get("tie_word_embeddings", True)),
        2 * width,  # the head's norm
        order="post",
        norm="layer",
        activation=str(config.get("hidden_act") or "gelu"),
        gated=False,
        dropouts=(_share(config, "hidden_dropout_prob", 0.1), _share(config, "attention_probs_dropout_prob", 0.1)),
        causal=False,
        rotary="no",
        beside=(Linear("lm_head.dense" if kind == "roberta" else "cls.predictions.transform.dense", width, width, bias=True),),
    )


def t5(config: Config, name: str, kind: str) -> Shape:
    """T5: encoder and decoder, positions as a bias of the first layer's attention."""
    width, inner, vocabulary = size(config, "d_model"), size(config, "d_ff"), size(config, "vocab_size")
    layers, count, head_dim = size(config, "num_layers"), size(config, "num_heads"), size(config, "d_kv")
    below, q = size(config, "num_decoder_layers", layers), count * head_dim
    gated = str(config.get("feed_forward_proj") or "relu").startswith("gated-")
    attention = [("q", width, q), ("k", width, q), ("v", width, q), ("o", q, width)]
    mlp = [("wi_0", width, inner), ("wi_1", width, inner)] if gated else [("wi", width, inner)]

    def block(sublayers: tuple[str, ...], at: int) -> tuple[Linear, ...]:
        inside = [Linear(f"layer.{i}.{s}.{n}", a, b) for i, s in enumerate(sublayers) for n, a, b in attention]
        return (*inside, *(Linear(f"layer.{at}.DenseReluDense.{n}", a, b) for n, a, b in [*mlp, ("wo", inner, width)]))

    buckets = size(config, "relative_attention_num_buckets", 32) * count
    return Shape(
        name,
        kind,
        width,
        inner,
        count,
        count,
        head_dim,
        vocabulary,
        (
            Stack("encoder.block", layers, block(("SelfAttention",), 1), 2 * width),
            Stack("decoder.block", below, block(("SelfAttention", "EncDecAttention"), 2), 3 * width, cross=True),
        ),
        vocabulary * width,
        Linear("lm_head", width, vocabulary),
        bool(config.get("tie_word_embeddings", True)),
        2 * width + 2 * buckets,
        norm="t5",
        rotary="no",
        activation="gelu_new" if gated else "relu",
        gated=gated,
        dropouts=(_share(config, "dropout_rate", 0.1), _share(config, "dropout_rate", 0.1)),
    )


def _share(config: Config, name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else float(value)


FAMILIES: dict[str, Callable[[Config, str, str], Shape]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"), gated_decoder
    ),
    **dict.fromkeys(("bert", "roberta"), encoder),
    "phi": phi,
    "falcon": falcon,
    "gpt_neox": gpt_neox,
    "gpt2": gpt2,
    "t5": t5,
}
