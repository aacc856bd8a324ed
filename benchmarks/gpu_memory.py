"""Section of `gpu.py`: memory as it is estimated against what a step held, for models up to 13B, with random weights."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from alone import rise
from on_gpu import Bench, free

import lora_nb as ln
from lora_nb.errors import LoraNbError
from lora_nb.memory.estimate import known_shapes

ALL = ln.LoraConfig(r=16, lora_alpha=24)


@dataclass(frozen=True)
class Case:
    """A step whose memory is estimated and measured."""

    model: str
    batch_size: int
    seq_len: int
    config: ln.LoraConfig = ALL
    quant: str | None = None
    gradient_checkpointing: bool = False

    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "seq_len": self.seq_len, "gradient_checkpointing": self.gradient_checkpointing}


QV = ln.LoraConfig(r=64, lora_alpha=24, target_modules=["q_proj", "v_proj"])
CASES = [
    Case("meta-llama/Llama-3.2-1B", 4, 1024),
    Case("meta-llama/Llama-3.2-1B", 8, 1024, gradient_checkpointing=True),
    Case("meta-llama/Llama-3.2-3B", 2, 1024),
    Case("meta-llama/Llama-3.2-3B", 4, 512, QV),
    Case("meta-llama/Llama-3.1-8B", 2, 1024),
    Case("meta-llama/Llama-3.1-8B", 4, 1024, gradient_checkpointing=True),
    Case("meta-llama/Llama-3.1-8B", 4, 512, quant="nf4"),
    Case("meta-llama/Llama-3.1-8B", 8, 1024, quant="nf4", gradient_checkpointing=True),
    Case("meta-llama/Llama-2-7b-hf", 4, 512, QV),
    Case("meta-llama/Llama-2-13b-hf", 1, 512),
    Case("meta-llama/Llama-2-13b-hf", 4, 1024, gradient_checkpointing=True),
    Case("meta-llama/Llama-2-13b-hf", 4, 512, quant="nf4", gradient_checkpointing=True),
    Case("mistralai/Mistral-7B-v0.3", 2, 512),
    Case("Qwen/Qwen2.5-0.5B", 8, 512),
    Case("Qwen/Qwen2.5-7B", 4, 1024, gradient_checkpointing=True),
    Case("Qwen/Qwen3-1.7B", 4, 512),
    Case("google/gemma-2-2b", 1, 1024),
    Case("microsoft/phi-2", 2, 512),
    Case("openai-community/gpt2-xl", 2, 512),
    Case("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 4, 512, ln.LoraConfig(r=8, lora_alpha=24, use_dora=True)),
]
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 6144,
}


def memory(bench: Bench) -> None:
    """`estimate` and `trace_memory` against what torch's allocator held at most."""
    errors: dict[str, list[float]] = {"estimate": [], "trace_memory": []}
    cases = bench.size(CASES, [replace(CASES[0], batch_size=2, seq_len=64)])
    try:
        for case in cases:
            if bench.is_late():
                break
            one(case, bench, errors)
    finally:  # what was found is told, whatever came then
        for name, target in (("estimate", "≤ 5"), ("trace_memory", "≤ 3")):
            values = errors[name]
            note = f"{len(values)} of {len(cases)} configurations, worst {max(values):.1f} %" if values else "not measured: no GPU"
            bench.add(
                f"{name} against max_memory_allocated: median error in %", statistics.median(values) if values else None, target, note
            )


def one(case: Case, bench: Bench, errors: dict[str, list[float]]) -> None:
    """One case, noted in full; its errors in per cent are put with those of the others."""
    try:
        found = held(case, bench)
    except (RuntimeError, LoraNbError) as error:
        found = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    free(bench.on)
    title = f"{case.model}, r={case.config.r}, {case.quant or 'bf16'}, {case.batch_size} × {case.seq_len}"
    title += ", checkpointing" if case.gradient_checkpointing else ""
    if measured_bytes := found.get("measured"):
        for name, values in errors.items():
            if name in found:
                found[f"{name}, error in %"] = round(100 * (found[name] / measured_bytes - 1), 2)
                values.append(abs(found[f"{name}, error in %"]))
    bench.cases.append({"case": title} | found)
    print(f"  {title}: {found}", flush=True)


def held(case: Case, bench: Bench) -> dict[str, Any]:
    """Bytes as estimated, as traced and as they were in the second step."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    numbers = dict(known_shapes()[case.model]) | bench.size({}, SMALL)
    given = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **numbers}
    with torch.device(bench.on):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[given["model_type"]](**given), dtype=torch.bfloat16)
    if case.quant:
        ln.quantize(model, ln.QuantConfig(quant_type=case.quant))  # type: ignore[arg-type]
    settings = case.settings()
    found: dict[str, Any] = {
        "estimate": ln.estimate(numbers, case.config, quant=case.quant, dtype="bfloat16", device="cuda", **settings).allocated,
    }
    try:
        found["trace_memory"] = ln.trace_memory(model, case.config, precision="bf16", **settings).total
    except (RuntimeError, LoraNbError) as error:
        found["not traced"] = str(error)[:200]
    ln.attach(model, case.config)
    rows = torch.randint(3, given["vocab_size"], (case.batch_size, case.seq_len)).tolist()
    data = ln.dataset([ln.datasets.Block(row, row) for row in rows])
    turns = ln.steps(model, ln.load("tiny", device="cpu")[1], data, ln.TrainConfig(max_steps=2, learning_rate=1e-5, **settings))
    next(turns)
    peak = rise(lambda: next(turns), bench.on)[1]
    return found | ({"measured": peak} if bench.on == "cuda" else {})
