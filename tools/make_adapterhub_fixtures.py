"""Make `tests/interop/adapterhub/` with AdapterHub's own library, and let that library judge what lora_nb writes.

    python tools/make_adapterhub_fixtures.py            # make the fixtures anew
    python tools/make_adapterhub_fixtures.py --rewrite FOLDER   # lora_nb reads each of them and saves it again
    python tools/make_adapterhub_fixtures.py --check FOLDER     # AdapterHub reads those and must compute the same

The first and the last run in an environment of their own, as `adapters` ends at transformers 4.57, which lora_nb does
not run on:

    python -m venv build/adapterhub
    build/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6

The second runs in the project's environment. Everything is seeded, so the first gives the same bytes again.

Of each model there is `model.safetensors` (its weights), `config.json`, `results.safetensors` (token ids, the output of
the base, of each adapter and of each stack of two) and a folder for each adapter, as `save_adapter` writes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parent.parent / "tests" / "interop" / "adapterhub"
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
FALCON = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 24, **ENDS}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32, **ENDS}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32, **ENDS}),
    "falcon": ("FalconConfig", "FalconForCausalLM", FALCON),
    "falcon-sequential": ("FalconConfig", "FalconForCausalLM", {**FALCON, "parallel_attn": False}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "bert": ("BertConfig", "BertForMaskedLM", {**SIZES, "max_position_embeddings": 32}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**SIZES, "max_position_embeddings": 32, **ENDS}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
}
PRESETS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"preset": "SeqBnConfig", "reduction_factor": 4},
    "houlsby": {"preset": "DoubleSeqBnConfig", "reduction_factor": 8},
    "parallel": {"preset": "ParBnConfig"},
}
BOTH = {"preset": "BnConfig", "mh_adapter": True, "output_adapter": True}
PLUS = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False, "scaling": "channel"}
OPTIONS: dict[str, dict[str, Any]] = {
    "after": {**BOTH, "reduction_factor": {"1": 2, "default": 4}, "non_linearity": "gelu", "ln_after": True, "original_ln_before": True},
    "plus": {**BOTH, **PLUS, "reduction_factor": 3, "non_linearity": "leakyrelu", "init_weights": "houlsby"},
    "before": {**BOTH, "reduction_factor": 0.5, "non_linearity": "gelu_new", "ln_before": True},
    "all-parallel": {**BOTH, "reduction_factor": 4, "non_linearity": "tanh", "is_parallel": True, "scaling": "learned"},
    "left-out": {**BOTH, "reduction_factor": 99, "non_linearity": "silu", "leave_out": [0], "scaling": 0.5},
}
CROSS = {"cross": {**BOTH, "cross_adapter": True, "reduction_factor": 4, "non_linearity": "relu", "leave_out": [1, 2]}}
MORE = {"llama": OPTIONS, "bert": OPTIONS, "t5": {**OPTIONS, **CROSS}}
STACKS = (("pfeiffer", "houlsby"), ("houlsby", "pfeiffer"))


def random_values(parameters: dict[str, Tensor], spread: float, seed: int) -> None:
    """Values large enough that every part of the model shows in its output; norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            p = parameters[name]
            values = torch.randn(p.shape, generator=generator) * spread
            p.copy_(1 + values if p.ndim == 1 and name.endswith("weight") else values)


def inputs(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(0)[:, :5].contiguous()} if kind == "t5" else {"input_ids": ids}


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    return model(**inputs(kind)).logits.contiguous()


# ---- with AdapterHub's library --------------------------------------------------------------------------------------


def interface(kind: str) -> Any:
    """AdapterHub knows no Falcon: this is how its users name the modules of such a model."""
    from adapters import AdapterModelInterface

    if not kind.startswith("falcon"):
        return None
    return AdapterModelInterface(
        adapter_methods=["bottleneck"],
        model_embeddings="word_embeddings",
        model_layers="h",
        layer_self_attn="self_attention",
        layer_cross_attn=None,
        attn_qkv_proj="query_key_value",
        attn_o_proj="dense",
        layer_intermediate_proj="mlp.dense_h_to_4h",
        layer_output_proj="mlp.dense_4h_to_h",
        layer_pre_self_attn="input_layernorm",
        layer_pre_ffn="post_attention_layernorm" if kind == "falcon-sequential" else "input_layernorm",
    )


def tiny(kind: str) -> nn.Module:
    """The model without adapters."""
    import transformers

    config, model, settings = MODELS[kind]
    made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    random_values(dict(made.named_parameters()), 0.25, seed=1)
    return made


def theirs(kind: str) -> nn.Module:
    """The same, ready for AdapterHub's adapters."""
    import adapters

    made = tiny(kind)
    adapters.init(made, interface=interface(kind))
    return made


def cases(kind: str) -> dict[str, dict[str, Any]]:
    return {**PRESETS, **MORE.get(kind, {})}


def add(model: nn.Module, case: str, settings: dict[str, Any], seed: int) -> None:
    import adapters

    settings = dict(settings)
    model.add_adapter(case, config=getattr(adapters, settings.pop("preset"))(**settings))
    random_values({name: p for name, p in model.named_parameters() if f"adapters.{case}." in name}, 0.4, seed)


def save_theirs(model: nn.Module, folder: Path, case: str) -> None:
    if "before" in case:  # safetensors refuses the norm that has two names, so their own call fails here
        from adapters.loading import AdapterLoader

        folder.mkdir()
        tensors, config = AdapterLoader(model).save_to_state_dict(case)
        save_file({key: t.clone() for key, t in tensors.items()}, folder / "adapter.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    else:
        model.save_adapter(str(folder), case, with_head=False, use_safetensors=True)


def acting(model: nn.Module, kind: str, names: list[str]) -> Tensor:
    from adapters import Stack

    model.set_active_adapters(Stack(*names))
    return logits(model, kind)


def make(kind: str) -> None:
    folder = FIXTURES / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = theirs(kind)
    weights = {key: t.clone() for key, t in tiny(kind).state_dict().items()}
    results = {**inputs(kind), "base": logits(model, kind)}
    for seed, (case, settings) in enumerate(cases(kind).items(), 2):
        add(model, case, settings, seed)
        save_theirs(model, folder / case, case)
        results[case] = acting(model, kind, [case])
    for stack in STACKS:
        results["+".join(stack)] = acting(model, kind, list(stack))
    spread = {case: f"{(t - results['base']).abs().max():.1e}" for case, t in results.items() if t.is_floating_point() and case != "base"}
    print(kind, spread)
    save_file(weights, folder / "model.safetensors")
    save_file(results, folder / "results.safetensors")
    (folder / "config.json").write_text(json.dumps({"class": MODELS[kind][1], "config": MODELS[kind][0], **MODELS[kind][2]}, indent=2))


def check(folder: Path) -> int:
    """The number of adapters by lora_nb that AdapterHub does not read to the same output."""
    wrong = 0
    for kind in MODELS:
        model, results = theirs(kind), load_file(FIXTURES / kind / "results.safetensors")
        for case in cases(kind):
            said: dict[str, Any] = {}
            model.load_adapter(str(folder / kind / case), load_as=case, loading_info=said, with_head=False, use_safetensors=True)
            gap = (acting(model, kind, [case]) - results[case]).abs().max().item()
            fine = gap <= 1e-5 and not said["missing_keys"] and not said["unexpected_keys"]
            wrong += not fine
            print(f"{kind:18} {case:13} {gap:.1e}", "" if fine else f"WRONG {said}")
    return wrong


# ---- with lora_nb ---------------------------------------------------------------------------------------------------


def rewrite(folder: Path) -> None:
    """Each adapter read by lora_nb and saved again; `tests/interop/test_adapterhub.py` holds the results to the fixtures."""
    import transformers

    import lora_nb as ln

    for kind, (config, model, settings) in MODELS.items():
        base = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
        base.load_state_dict(load_file(FIXTURES / kind / "model.safetensors"))
        for case in cases(kind):
            ln.load_adapter(base, FIXTURES / kind / case, case)
            ln.save(base, folder / kind / case, case)
            ln.detach(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewrite", type=Path, metavar="FOLDER")
    parser.add_argument("--check", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    if asked.rewrite:
        rewrite(asked.rewrite)
    elif asked.check:
        sys.exit(check(asked.check))
    else:
        for kind in MODELS:
            make(kind)


if __name__ == "__main__":
    main()
