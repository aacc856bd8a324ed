"""Memory as it is estimated and as it is: own measurements of training steps, and tables that others have published.

    python benchmarks/memory.py [--quick] [--only measured published]     writes benchmarks/results/memory.json

Measured is what torch's own allocator holds at its highest over one step of the public loop, `ln.steps`, in a process of its own,
on a CPU: every allocation and release as torch's profiler records it. That is what `torch.cuda.max_memory_allocated()` is on a GPU.
The process' resident memory, which the table has beside it, holds the interpreter, the libraries and freed pages as well.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import csv
import gc
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from alone import alone, rise
from measure import RESULTS, machine

import lora_nb as ln
from lora_nb.configs.quant import QuantConfig
from lora_nb.memory.measured import rise as allocated

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

TABLE = Path(__file__).parent / "published_memory.csv"
LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8}
GROUPED = LLAMA | {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 27M, 32k": LLAMA | {"num_hidden_layers": 8, "vocab_size": 32000, "tie_word_embeddings": True},
    "Llama 27M, 4k": LLAMA | {"num_hidden_layers": 8, "vocab_size": 4096, "tie_word_embeddings": True},
    "Llama, 12 heads of 4": GROUPED | {"num_hidden_layers": 6, "vocab_size": 32000, "tie_word_embeddings": False},
    "Qwen 3 type": GROUPED | {"model_type": "qwen3", "head_dim": 64, "num_hidden_layers": 6, "vocab_size": 32000},
    "Gemma 2 type": GROUPED | {"model_type": "gemma2", "head_dim": 64, "num_hidden_layers": 4, "vocab_size": 32000},
    "Phi type": LLAMA | {"model_type": "phi", "num_hidden_layers": 6, "vocab_size": 16000},
    "GPT-2, 4 layers": {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 4, "vocab_size": 50257, "n_positions": 1024},
}
QUICK = {"num_hidden_layers": 2, "n_layer": 2, "hidden_size": 96, "n_embd": 96, "intermediate_size": 264, "vocab_size": 300, "head_dim": 8}
ALL = ln.LoraConfig(r=8, lora_alpha=20)
QV = ln.LoraConfig(r=32, lora_alpha=20, target_modules=["q_proj", "v_proj"])


@dataclass(frozen=True)
class Case:
    """One configuration of a training step."""

    model: str
    method: str
    config: Any
    batch_size: int
    seq_len: int
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1

    def settings(self) -> dict[str, Any]:
        names = ("batch_size", "seq_len", "gradient_checkpointing", "gradient_accumulation_steps")
        return {name: getattr(self, name) for name in names}


CASES = [
    Case("Llama 27M, 32k", "LoRA r=8, all", ALL, 4, 256),
    Case("Llama 27M, 32k", "LoRA r=8, all", ALL, 8, 256, "float32", gradient_checkpointing=True),
    Case("Llama 27M, 32k", "LoRA r=8, all", ALL, 1, 1024, "bfloat16"),
    Case("Llama 27M, 32k", "LoRA r=32, q v", QV, 2, 512),
    Case("Llama 27M, 32k", "LoRA r=32, q v", QV, 4, 256, "bfloat16"),
    Case("Llama 27M, 32k", "full", "full", 4, 256),
    Case("Llama 27M, 32k", "full", "full", 4, 256, "float32", gradient_checkpointing=True),
    Case("Llama 27M, 32k", "LoRA r=8, all, two forwards", ALL, 2, 256, gradient_accumulation_steps=2),
    Case("Llama 27M, 4k", "LoRA r=128, all", ln.LoraConfig(r=128, lora_alpha=20), 4, 256),
    Case("Llama 27M, 4k", "LoRA r=8, MLP", ln.LoraConfig(r=8, lora_alpha=20, target_modules=["up_proj", "down_proj"]), 4, 256),
    Case("Llama 27M, 4k", "LoRA r=8, dropout 0.05", ln.LoraConfig(r=8, lora_alpha=20, lora_dropout=0.05), 4, 256),
    Case("Llama 27M, 4k", "DoRA r=8, all", ln.LoraConfig(r=8, lora_alpha=20, use_dora=True), 4, 256),
    Case("Llama 27M, 4k", "Houlsby 1/16", ln.BottleneckConfig.houlsby(), 4, 256),
    Case("Llama 27M, 4k", "Pfeiffer 1/8", ln.BottleneckConfig.pfeiffer(8), 8, 128, "bfloat16"),
    Case("Llama 27M, 4k", "parallel 1/2", ln.BottleneckConfig.parallel(), 2, 512),
    Case("Llama 27M, 4k", "full", "full", 2, 512, "bfloat16"),
    Case("Llama, 12 heads of 4", "LoRA r=16, all", ln.LoraConfig(r=16, lora_alpha=20), 2, 512),
    Case("Llama, 12 heads of 4", "LoRA r=16, all", ln.LoraConfig(r=16, lora_alpha=20), 2, 512, "bfloat16"),
    Case("Llama, 12 heads of 4", "LoRA r=16, all", ln.LoraConfig(r=16, lora_alpha=20), 8, 128, "bfloat16", gradient_checkpointing=True),
    Case("Llama, 12 heads of 4", "full", "full", 1, 512),
    Case("Qwen 3 type", "LoRA r=8, all", ALL, 2, 384),
    Case("Qwen 3 type", "LoRA r=32, q v", QV, 4, 256, "bfloat16"),
    Case("Gemma 2 type", "LoRA r=8, all", ALL, 2, 512),
    Case("Gemma 2 type", "LoRA r=8, all", ALL, 2, 256, "bfloat16", gradient_checkpointing=True),
    Case("Phi type", "LoRA r=8, all", ALL, 4, 256),
    Case("Phi type", "full", "full", 2, 256, "bfloat16"),
    Case("GPT-2, 4 layers", "LoRA r=8, all", ALL, 2, 256),
    Case("GPT-2, 4 layers", "full", "full", 1, 512),
]


@dataclass(frozen=True)
class Row:
    """One configuration: bytes measured and estimated, and the relative errors."""

    case: str
    measured: int
    closed: int
    traced: int | None = None
    rule: int | None = None
    grown: tuple[int, int, int] | None = None
    resident: int | None = None
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)

    def checked(self) -> Row:
        """With the errors, in percent."""
        found = {"closed": self.closed, "traced": self.traced, "rule": self.rule}
        errors = {name: round(100 * (value / self.measured - 1), 2) for name, value in found.items() if value is not None}
        if self.grown:
            base = self.grown[0]
            errors |= {
                f"{name}, growth": round(100 * (v / base - 1), 2) for name, v in zip(("closed", "traced"), self.grown[1:], strict=True)
            }
        return Row(**{**asdict(self), "errors": errors})


# Own measurements


def numbers(case: Case, quick: bool) -> dict[str, Any]:
    """The config's numbers; tiny ones where it is only to be seen that all runs."""
    found = MODELS[case.model]
    return {**found, **{name: value for name, value in QUICK.items() if name in found}} if quick else found


def model_of(case: Case, quick: bool) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    given = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **numbers(case, quick)}
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[given["model_type"]](**given), dtype=getattr(torch, case.dtype))
    if case.config != "full":
        ln.attach(made, case.config)
    return made


def measured(case: Case, quick: bool) -> tuple[int, int, int]:
    """Bytes before the second step, at most during it, and by how much resident memory rose during the third."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = model_of(case, quick)
    vocabulary = model.config.vocab_size
    rows = torch.randint(3, vocabulary, (case.batch_size * case.gradient_accumulation_steps, case.seq_len)).tolist()
    settings = case.settings() | {"learning_rate": 1e-5, "max_steps": 3}
    data = ln.dataset([ln.datasets.Block(row, row) for row in rows])
    turns = ln.steps(model, ln.load("tiny", device="cpu")[1], data, ln.TrainConfig(**settings))
    next(turns)
    gc.collect()
    before = held()
    highest = allocated(lambda: next(turns))
    return before, before + highest, rise(lambda: next(turns), "cpu")[0]


def held() -> int:
    """Bytes of all tensors that are there, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def own(quick: bool) -> list[Row]:
    rows = []
    for case in CASES[:: 9 if quick else 1]:
        before, peak, resident = alone(measured, case, quick)
        given, settings = numbers(case, quick), case.settings()
        closed = ln.estimate(given, case.config, dtype=case.dtype, device="cpu", **settings)
        traced = ln.trace_memory(given, case.config, dtype=case.dtype, **settings)
        grown = (peak - before, *(e.total - sum(e.parts.get(n, 0) for n in ("weights", "adapters", "optimizer")) for e in (closed, traced)))
        title = f"{case.model}; {case.method}; {case.batch_size} × {case.seq_len}; {case.dtype}"
        title += "; checkpointing" if case.gradient_checkpointing else ""
        rows.append(Row(title, peak, closed.total, traced.total, grown=grown, resident=resident).checked())
        print(line(rows[-1]), flush=True)
    return rows


# Published tables


def accelerate_rule(parameters: int, bits: float, training: bool) -> int:
    """`accelerate estimate-memory`: the weights; for training with Adam four times as much, whatever trains and however long texts are."""
    return round(parameters * bits / 8 * (4 if training else 1))


def published(quick: bool) -> list[Row]:
    rows = []
    for given in list(csv.DictReader(TABLE.open()))[:: 12 if quick else 1]:
        config: Any = "full"
        if given["method"] != "full":
            config = ln.LoraConfig(
                r=int(given["rank"]), lora_alpha=20, lora_dropout=float(given["dropout"]), target_modules=given["targets"].split()
            )
        quant = given["quant"] or None
        if quant:
            quant = QuantConfig(quant_type="nf4", double_quant=quant == "nf4-dq")
        found = ln.estimate(
            given["model"],
            config,
            quant=quant,
            batch_size=int(given["batch"]),
            seq_len=int(given["seq"]),
            gradient_checkpointing=given["checkpointing"] == "yes",
            gradient_accumulation_steps=int(given["accumulation"]),
            framework=given["framework"],
        )
        measured_bytes = round(float(given["measured"]) * (1e9 if given["unit"] == "GB" else 2**30))
        parameters = ln.estimate(given["model"], dtype="float32", device="cpu").parts["weights"] // 4
        rule = accelerate_rule(parameters, 4 if quant else 16, training=True)
        title = f"{given['model']}; {given['method']}{' ' + given['quant'] if quant else ''} r={given['rank'] or '-'} {given['targets']}; "
        title += f"{given['batch']} × {given['seq']}"
        rows.append(Row(title, measured_bytes, found.allocated, rule=rule, note=given["group"]).checked())
        print(line(rows[-1]), flush=True)
    return rows


# The table


def line(row: Row) -> str:
    said = ", ".join(f"{name} {value:+.1f} %" for name, value in row.errors.items())
    return f"| {row.case} | {row.measured / 1e9:.3f} GB | {said} | {row.note} |"


def summary(rows: list[Row], name: str, median: float, worst: float) -> dict[str, Any]:
    """Median and worst of the errors' sizes, and whether they are what was aimed at."""
    sizes = [abs(row.errors[name]) for row in rows if name in row.errors]
    found = {"rows": len(sizes), "median": round(statistics.median(sizes), 2), "worst": round(max(sizes), 2)}
    return found | {"aim": [median, worst], "met": found["median"] <= median and found["worst"] <= worst}


def summaries(section: str, rows: list[Row]) -> dict[str, Any]:
    if section == "measured":
        names = {"closed": (5, 12), "traced": (3, 8), "closed, growth": (5, 12), "traced, growth": (3, 8)}
        return {name: summary(rows, name, *aims) for name, aims in names.items()}
    groups = dict.fromkeys(row.note for row in rows)
    return {
        f"{group}: {name}": summary([r for r in rows if r.note == group], name, 5, 12) for group in groups for name in ("closed", "rule")
    }


SECTIONS: dict[str, Callable[[bool], list[Row]]] = {"measured": own, "published": published}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases at a tiny size, to see that it runs; writes only with --out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or (None if args.quick else RESULTS / "memory.json")
    sections = json.loads(out.read_text())["sections"] if out and out.exists() else {}
    for name in args.only:
        rows = SECTIONS[name](args.quick)
        found = summaries(name, rows)
        print("\n".join(f"{name}: {what}: {values}" for what, values in found.items()), flush=True)
        sections[name] = {"machine": machine(), "summary": found, "rows": [asdict(row) for row in rows]}
        if out:
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps({"sections": sections}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
