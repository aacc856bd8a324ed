"""How fast and how lean training is, against Hugging Face PEFT and against the frozen model itself.

    python benchmarks/training.py [--quick] [--only step-27M tone …] [--threads 1 2]     writes benchmarks/results/training.json

Peers are interleaved in one process, on the same weights, with the same adapter, whose outputs are first shown to be equal; ratios are
medians over the rounds. Memory is measured in a process for each. Ours is always the public loop, `ln.steps` or `ln.train`.
The last section is a ladder from a loop as one writes it first to everything that there is (`ladder.py`). Of a GPU `gpu.py` tells more.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # bars cost time, and on both sides
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import ladder
import peft
import torch
from alone import alone, rise
from measure import RESULTS, Line, Times, interleaved, machine
from peers import adapted, floor_steps, llama, next_token, our_epoch, our_steps, peft_steps, sharing, trainer_epoch

import lora_nb as ln

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # a name that PEFT 0.21 still reads


@dataclass(frozen=True)
class Setting:
    quick: bool
    threads: tuple[int, ...]

    def rounds(self, full: int) -> int:
        return 2 if self.quick else full

    def shape(self, name: str) -> str:
        return "quick" if self.quick else name


# The sections of the table


def step_time(shape: str, tokens: int, targets: tuple[str, str], setting: Setting, rounds: int) -> list[Line]:
    """Seconds of an optimizer step over PEFT's and over the floor's."""
    base, rows = llama(setting.shape(shape)), []
    ids = torch.randint(3, base.config.vocab_size, (tokens // 256, 256))
    for threads in setting.threads:
        torch.set_num_threads(threads)
        ours, theirs = adapted(base, ids)
        variants = {"lora_nb": our_steps(ours, ids), "PEFT": peft_steps(theirs, ids), "floor": floor_steps(sharing(base), ids)}
        times = interleaved(variants, rounds=setting.rounds(rounds))
        title = f"step, {shape}, {tokens:,} tokens, all-linear r=8"
        rows += [compared(f"{title} / PEFT", times, "PEFT", threads, targets[0])]
        rows += [compared(f"{title} / floor", times, "floor", threads, targets[1], more=f"PEFT {times.ratio('PEFT', 'floor'):.3f}")]
    return rows


def compared(measure: str, times: Times, peer: str, threads: int, target: str, *, more: str = "") -> Line:
    low, high = times.spread("lora_nb", peer)
    said = f"middle half {low:.3f} to {high:.3f}; {1000 * times.median('lora_nb'):.1f} ms"
    return Line(measure, threads, times.ratio("lora_nb", peer), target, f"{said}; {more}" if more else said)


def tone(setting: Setting) -> list[Line]:
    """Tokens a second of one epoch over short pairs, padding not counted, against transformers' Trainer at its defaults."""
    rows = []
    for pairs, target in ((32, "≥ 1.8"), (8, "≥ 1.55")):
        base, tokenizer = ln.load("tiny", device="cpu")
        data = ln.dataset("tone")[: (6 if setting.quick else 12) * pairs]
        blocks = data.encode(tokenizer, 256)
        tokens = sum(len(b.input_ids) for b in blocks)
        title = f"tokens a second on tone, {pairs} pairs a step / Trainer"
        for threads in setting.threads:
            torch.set_num_threads(threads)
            ours, theirs = adapted(base, torch.tensor([blocks[0].input_ids]))
            variants = {"lora_nb": our_epoch(ours, tokenizer, data, pairs), "PEFT": trainer_epoch(theirs, tokenizer, blocks, pairs)}
            times = interleaved(variants, rounds=setting.rounds(5), warm_up=1)
            speed = f"{tokens / times.median('lora_nb'):,.0f} and {tokens / times.median('PEFT'):,.0f} tokens/s"
            rows.append(Line(title, threads, times.ratio("PEFT", "lora_nb"), target, speed))
    return rows


def memory(setting: Setting) -> list[Line]:
    """Growth over the step: 27M type with a vocabulary of 32,000, 2,048 tokens, each in a process of its own."""
    ours, theirs = (alone(growth, peer, setting.shape("27M, 32k"), 8, 256) for peer in ("lora_nb", "PEFT"))
    note = f"{ours / 2**20:.0f} and {theirs / 2**20:.0f} MiB"
    return [Line("growth of memory over the step, 27M type, 32k vocabulary, 2,048 tokens / PEFT", 1, ours / theirs, "≤ 0.6", note)]


def growth(peer: str, shape: str, batch: int, length: int) -> int:
    """Over two steps, after a small one that loads what libraries load late."""
    torch.set_num_threads(1)
    base = llama(shape)
    ids = torch.randint(3, base.config.vocab_size, (batch, length))
    model, make = dict(zip(("lora_nb", "PEFT"), zip(adapted(base, ids[:, :8]), (our_steps, peft_steps), strict=True), strict=True))[peer]
    make(model, ids[:1, :8])()
    step = make(model, ids)
    return rise(lambda: (step(), step()), "cpu")[0]


def decode(setting: Setting) -> list[Line]:
    """One token after a prompt of 32, unmerged r=8, over the base."""
    rows = []
    for shape, target in (("124M", "≤ 1.06"), ("5.8M", "≤ 1.12")):
        base = llama(setting.shape(shape)).requires_grad_(requires_grad=False)
        ids = torch.randint(3, base.config.vocab_size, (1, 32))
        for threads in setting.threads:
            torch.set_num_threads(threads)
            ours, theirs = adapted(base, ids)
            with torch.no_grad():
                variants = {name: next_token(m.eval(), ids) for name, m in (("lora_nb", ours), ("PEFT", theirs), ("base", base))}
                times = interleaved(variants, rounds=setting.rounds(60 if shape == "124M" else 150), repeat=4)
            note = f"PEFT {times.ratio('PEFT', 'base'):.3f}"
            rows.append(compared(f"one decoded token, {shape}, unmerged r=8 / base", times, "base", threads, target, more=note))
    return rows


def climb(setting: Setting) -> list[Line]:
    """The ladder: tokens a second, growth and peak of memory at each rung."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for rung in ladder.RUNGS:
            found = alone(ladder.measured, rung, device, setting.quick, setting.threads[-1])
            note = found.missing or f"growth {found.growth / 2**20:,.0f} MiB, peak {found.peak / 2**20:,.0f} MiB; loss {found.loss:.3f}"
            rows.append(Line(f"ladder, {device}: {rung}, tokens/s", setting.threads[-1], found.tokens_per_second, "", note))
    return rows


SECTIONS: dict[str, Callable[[Setting], list[Line]]] = {
    "step-27M": lambda s: step_time("27M", 1024, ("≤ 0.82", "≤ 1.05"), s, 12),
    "step-5.8M": lambda s: step_time("5.8M", 2048, ("≤ 0.83", "≤ 1.12"), s, 16),
    "tone": tone,
    "memory": memory,
    "decode": decode,
    "ladder": climb,
}


def line(row: Line) -> str:
    value = "" if row.value is None else f"{row.value:,.0f}" if row.value >= 10 else f"{row.value:.3f}"
    return "| " + " | ".join((row.measure, str(row.threads or ""), value, row.target, row.met, row.note)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything at a tiny size, to see that it runs; writes only with --out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or (None if args.quick else RESULTS / "training.json")
    sections = json.loads(out.read_text())["sections"] if out and out.exists() else {}  # those that are not measured now stay
    setting = Setting(args.quick, tuple(args.threads))
    print("| measure | threads | measured | target | met | |\n|" + " --- |" * 6)
    for name in args.only:
        rows = SECTIONS[name](setting)
        print("\n".join(line(row) for row in rows), flush=True)
        sections[name] = {"machine": machine() | peers(), "rows": [asdict(row) | {"met": row.met} for row in rows]}
        if out:
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps({"sections": sections}, indent=1, ensure_ascii=False) + "\n")


def peers() -> dict[str, str]:
    import transformers

    return {"peft": peft.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
