"""QLoRA on the embedded base: does it learn as much as LoRA over 16 bits, what does merging lose, and what does a step need?

    python benchmarks/qlora.py [--only recovery|merging|step|loading] [--steps 80] [--quick]   writes benchmarks/results/qlora.json

recovery: held-out bits per byte on `stdlib` as in recovery.py: the same batches, rates tuned on seed 0 in steps of √10, three
  seeds at the best; tuning and reporting use different files. "16 bits" is the base as it is stored, in bfloat16.
merging: the adapters of those QLoRA runs, merged into each of the three targets: bits per byte afterwards, and, layer by layer,
  how much of the update arrives. Then the same with each update scaled to a share of its weight.
step: peak memory of one training step on a random Llama of 1.2 billion parameters, in a process of its own.
loading: peak memory of `load(…, quant="nf4")` over the larger of the file and the result, in a process of its own.

Finished runs are kept in the results, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from alone import alone, rise
from measure import machine
from torch import nn

import lora_nb as ln

RESULT = Path(__file__).parent / "results" / "qlora.json"
BASES = {"LoRA, 16-bit base": None, "QLoRA, NF4 base": "nf4"}
RATES = (3.16e-3, 1e-2, 3.16e-2)  # around the best of recovery.py; goes on outwards while the best stands at the edge
SEEDS = (0, 1, 2)
R, ALPHA = 8, 32.0
SHARES = (0.3, 0.1, 0.03, 0.01)  # ‖Δ‖/‖W‖
TARGETS = {"recovery": 0.97, "loading": 1.2}
Numbers = dict[str, Any]


def one_run(quant: str | None, rate: float, seed: int, steps: int) -> Numbers:
    """Fine-tune once; of a base in four bits also what each way of merging leaves."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = ln.load("tiny", quant=quant, device="cpu")
    held = ln.dataset("stdlib", "test")
    tuning, reporting = held[0::2], held[1::2]

    def bits(data: Any, blocks: int = 160) -> float:
        return float(ln.evaluate(model, tokenizer, data, max_blocks=blocks).bits_per_byte)

    found: Numbers = {"before": bits(reporting)}
    ln.attach(model, ln.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    config = ln.TrainConfig(max_steps=steps, batch_size=8, seq_len=256, learning_rate=rate, seed=seed, lr_scheduler_type="linear")
    try:
        run = ln.train(model, tokenizer, ln.dataset("stdlib", "train"), config)
    except ln.errors.TrainingError:
        return found | {"tuning": float("inf"), "bits_per_byte": float("inf")}
    found |= {"tuning": bits(tuning, 80), "bits_per_byte": bits(reporting), "tokens": run.tokens}
    if quant is not None:
        found["merging"] = {into: merged(model, into, lambda: bits(reporting)) for into in ("dequantized", "original", "requantized")}
        found["shares"] = shares(model)
    return found


def merged(model: nn.Module, into: str, bits: Any) -> Numbers:
    """The model after merging; it is put back."""
    import warnings

    original = ln.load("tiny", device="cpu")[0] if into == "original" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that little is left is what is measured
        report = ln.merge(model, into=into, original=original)
    found = {"bits_per_byte": bits(), "survived": report.survived, "output_change": report.output_change}
    ln.unmerge(model)
    return found


def shares(model: nn.Module) -> dict[str, list[Numbers]]:
    """For each layer and share: how much of the update is left after requantizing, and the noise that comes with it."""
    from lora_nb.attach import weights
    from lora_nb.layers.nf4 import dequantize, quantize

    original = dict(ln.load("tiny", device="cpu")[0].named_parameters())
    found: dict[str, list[Numbers]] = {"as trained": [], **{str(s): [] for s in SHARES}}
    for path, part in weights(model, "default").items():
        quantized = model.get_submodule(path).quantized
        w, dense = original[f"{path}.weight"].detach().float(), dequantize(quantized, torch.float32)
        update = part.delta().detach().float()
        for name, numbers in found.items():
            size = float(w.norm()) * (float(name) if name != "as trained" else float(update.norm() / w.norm()))
            delta = update * (size / float(update.norm()))
            arrived = dequantize(quantize(dense + delta, quantized.block_size, quantized.nested), torch.float32) - dense
            numbers.append(
                {
                    "share": size / float(w.norm()),
                    "left": float((arrived * delta).sum() / delta.square().sum()),
                    "noise, requantized": float((arrived - delta).norm() / delta.norm()),
                    "noise, into the original": float((w - dense).norm() / delta.norm()),
                }
            )
    return found


class Results:
    """Everything measured so far, written after each run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: Numbers = json.loads(path.read_text()) if path.exists() else {"runs": {}, "sections": {}}

    def run(self, base: str, rate: float, seed: int, steps: int) -> Numbers:
        key = f"{base} | rate {rate:.3g} | seed {seed} | {steps} steps"
        if key not in self.content["runs"]:
            words = [sys.executable, __file__, "--one", str(BASES[base]), str(rate), str(seed), str(steps)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.content["runs"][key] = json.loads(done.stdout.splitlines()[-1])
            self.write()
            print(f"{key}: {self.content['runs'][key]['bits_per_byte']:.4f} bits per byte", flush=True)
        return self.content["runs"][key]

    def write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(
            json.dumps({"machine": machine(), **{k: v for k, v in self.content.items() if k != "machine"}}, indent=1) + "\n"
        )


def tuned(base: str, results: Results, steps: int, *, quick: bool) -> tuple[float, list[Numbers]]:
    """The best rate on the tuning files, and its runs over all seeds."""
    rates = list(RATES[1:2] if quick else RATES)
    scores = {rate: results.run(base, rate, 0, steps)["tuning"] for rate in rates}
    while not quick and (best := min(scores, key=lambda r: scores[r])) in {min(scores), max(scores)}:
        rate = best / 10**0.5 if best == min(scores) else best * 10**0.5
        scores[rate] = results.run(base, rate, 0, steps)["tuning"]
    best = min(scores, key=lambda r: scores[r])
    return best, [results.run(base, best, seed, steps) for seed in (SEEDS[:1] if quick else SEEDS)]


def recovery(found: dict[str, tuple[float, list[Numbers]]]) -> list[Numbers]:
    rows = []
    reference = next(iter(found.values()))[1]
    for base, (rate, runs) in found.items():
        bits = [r["bits_per_byte"] for r in runs]
        gains = [
            (full["before"] - r["bits_per_byte"]) / (full["before"] - full["bits_per_byte"])
            for r, full in zip(runs, reference, strict=True)
        ]
        rows.append(
            {
                "base": base,
                "learning rate": float(f"{rate:.3g}"),
                "bits per byte, before": round(runs[0]["before"], 4),
                "after, mean": round(statistics.mean(bits), 4),
                "after, spread": round(max(bits) - min(bits), 4),
                "share of LoRA's gain": round(statistics.mean(gains), 4),
                "share, lowest": round(min(gains), 4),
                "target": TARGETS["recovery"],
            }
        )
    return rows


def merging(runs: list[Numbers]) -> dict[str, list[Numbers]]:
    """Means over the seeds of what each target leaves, and medians over layers and seeds of the update's fate by its size."""
    targets = []
    for into in runs[0]["merging"]:
        each = [r["merging"][into] for r in runs]
        left = [v for m in each for v in m["survived"].values()]
        change = [v for m in each for v in m["output_change"].values()]
        targets.append(
            {
                "merged into": into,
                "bits per byte, unmerged": round(statistics.mean(r["bits_per_byte"] for r in runs), 4),
                "merged": round(statistics.mean(m["bits_per_byte"] for m in each), 4),
                "update left, median": round(statistics.median(left), 4),
                "least": round(min(left), 4),
                "change of output, median": round(statistics.median(change), 6),
            }
        )
    by_size = []
    for name in runs[0]["shares"]:
        layers = [layer for r in runs for layer in r["shares"][name]]
        middle = {key: round(statistics.median(layer[key] for layer in layers), 4) for key in layers[0]}
        by_size.append({"‖Δ‖/‖W‖": name, **middle})
    return {"targets": targets, "by size of the update": by_size}


def big_config(*, quick: bool) -> Any:
    """The shape of Llama-3.2-1B."""
    from transformers import LlamaConfig

    small: Numbers = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 6144} if quick else {}
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256, **small}
    return LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)


def big_model(*, quick: bool) -> nn.Module:
    """Random weights in NF4, made and quantized one layer at a time, so that the dense model never lies in memory."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from lora_nb.quantization import choose
    from lora_nb.quantized_layers import quantized_layer

    config, quant = big_config(quick=quick), ln.QuantConfig()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name in choose(model, quant)[0]:
        linear = model.get_submodule(name)
        model.set_submodule(name, quantized_layer(linear, torch.randn(linear.weight.shape) * 0.02, quant))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[key] = nn.Parameter(torch.randn(p.shape) * 0.02 if p.ndim > 1 else torch.ones(p.shape))
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def step(quick: bool, tokens: int) -> Numbers:
    """One step of QLoRA: forward, backward, optimizer."""
    import psutil
    from transformers import AutoTokenizer

    from lora_nb.bases import EMBEDDED

    torch.manual_seed(0)
    start = psutil.Process().memory_info().rss
    model = big_model(quick=quick)
    ln.attach(model, ln.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    loaded = psutil.Process().memory_info().rss - start
    config = ln.TrainConfig(max_steps=1, batch_size=1, seq_len=tokens, learning_rate=1e-4, gradient_checkpointing=True)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    data = ln.dataset("stdlib", "train")
    growth, _ = rise(lambda: ln.train(model, tokenizer, data, config), "cpu")
    return {"loaded": loaded, "step": growth, "total": loaded + growth, "parameters": sum(big_parameters(model))}


def big_parameters(model: nn.Module) -> list[int]:
    return [m.in_features * m.out_features for m in model.modules() if hasattr(m, "weight_dense") and hasattr(m, "quantized")]


def estimated(tokens: int, *, quick: bool) -> int:
    """What `estimate` says of the same."""
    settings = {"quant": "nf4", "batch_size": 1, "seq_len": tokens, "dtype": torch.float32, "gradient_checkpointing": True}
    return int(
        ln.estimate(
            big_config(quick=quick), ln.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"), **settings, device="cpu"
        ).total
    )


def loading(folder: str) -> Numbers:
    """How far memory rises while a folder is read into four bits."""
    from lora_nb.quantization import size

    kept: list[nn.Module] = []
    growth, _ = rise(lambda: kept.append(ln.load(folder, quant="nf4", device="cpu", dtype=torch.bfloat16)[0]), "cpu")
    shard = max(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    result = size(kept[0])
    return {
        "shard": shard,
        "result": result,
        "peak": growth,
        "over the larger": round(growth / max(shard, result), 3),
        "target": TARGETS["loading"],
    }


def saved_model(folder: Path, *, quick: bool) -> None:
    """A random Llama of 0.4 billion parameters in bfloat16, in one file; made in the calling process, read in another."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lora_nb.bases import EMBEDDED

    width = 128 if quick else 1024
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 24, "vocab_size": 6144}
    config = LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=16, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(EMBEDDED["tiny"]).save_pretrained(folder)


def main() -> None:
    if "--one" in sys.argv:
        quant, rate, seed, steps = sys.argv[sys.argv.index("--one") + 1 :]
        print(json.dumps(one_run(None if quant == "None" else quant, float(rate), int(seed), int(steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recovery", "merging", "step", "loading"], help="this section alone")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results, quick = Results(args.out), args.quick
    sections = results.content["sections"]
    wanted = [args.only] if args.only else ["recovery", "merging", "step", "loading"]
    if "recovery" in wanted or "merging" in wanted:
        bases = list(BASES) if "recovery" in wanted else ["QLoRA, NF4 base"]
        found = {base: tuned(base, results, 2 if quick else args.steps, quick=quick) for base in bases}
        if "recovery" in wanted:
            sections["recovery"] = recovery(found)
        sections["merging"] = merging(found["QLoRA, NF4 base"][1])
    if "step" in wanted:
        tokens = 64 if quick else 512
        measured = alone(step, quick, tokens)
        estimate = estimated(tokens, quick=quick)
        sections["step"] = {"tokens": tokens, **measured, "estimated": estimate}
    if "loading" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            saved_model(Path(folder), quick=quick)
            sections["loading"] = alone(loading, folder)
    results.write()
    print(json.dumps({name: sections[name] for name in sections if name in {*wanted, "merging"}}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
