"""What many adapters over one base cost: in a layer, in a batch that is being written, beside training, and on disk.

    python benchmarks/serving.py [--quick] [--only layer peft …] [--threads 1 2]       writes benchmarks/results/serving.json

Variants are interleaved, on the same weights, and their outputs first shown to be equal; ratios are medians over the rounds. A section that
is run again takes the place of its old rows. The soak test is a script of its own, `soak.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from measure import RESULTS, Line, interleaved, machine
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.adapter_files import read_folder
from lora_nb.attach import layers
from lora_nb.layers.mixed import Routing
from lora_nb.layers.ways import COSTS, WAYS, Plan, chosen
from lora_nb.packed import KeyValues, Pass, Row, forward, sent

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # a name that PEFT 0.21 still reads
WIDTH, R, ALPHA, TOKENS = 2048, 16, 24.0, 512


@dataclass(frozen=True)
class Setting:
    quick: bool
    threads: tuple[int, ...]

    def rounds(self, full: int) -> int:
        return 2 if self.quick else full

    @property
    def width(self) -> int:
        return 64 if self.quick else WIDTH

    @property
    def most(self) -> int:
        return 12 if self.quick else 100

    @property
    def adapters(self) -> tuple[int, ...]:
        return (1, 4, 12) if self.quick else (1, 10, 100)


def adapted(width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[str | None]]:
    """A linear layer with so many adapters, none of them training, and a random one for each of the tokens."""
    torch.manual_seed(count)
    model = nn.Sequential(nn.Linear(width, width, bias=False)).to(dtype)
    names = [f"a{i}" for i in range(count)]
    for name in names:
        ln.attach(model, ln.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]), name)
    with torch.no_grad():
        for part in model[0].adapters.values():
            part.lora_B.normal_(std=0.02)
    ln.set_active(model, [])
    model.to(dtype)
    whose = [*names, *(names[int(i)] for i in torch.randint(count, (max(0, TOKENS - count),)))][:TOKENS]
    return model, [whose[int(i)] for i in torch.randperm(TOKENS)]


def mixed(model: nn.Module, names: Sequence[str | None], x: Tensor) -> Callable[[], Tensor]:
    """A forward whose routing has been computed."""
    routing = Routing(names)
    layer = model[0]
    layer.active = ()

    def run() -> Tensor:
        layer.__dict__["routing"] = routing
        try:
            with torch.no_grad():
                return model(x)
        finally:
            layer.__dict__["routing"] = None

    return run


def one_by_one(model: nn.Module, names: Sequence[str | None], x: Tensor, *, base: bool) -> Callable[[], Tensor]:
    """As one writes it first: for each adapter its tokens are picked, multiplied and put back."""
    layer = model[0]
    places = {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}
    parts = {name: layer.adapters[name] for name in places}

    def run() -> Tensor:
        with torch.no_grad():
            y = layer.base(x) if base else torch.zeros(len(x), layer.out_features, dtype=x.dtype)
            for name, where in places.items():
                part = parts[name]
                y[where] += F.linear(F.linear(x[where], part.lora_A), part.lora_B) * part.scaling
            return y

    return run


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max(), float((a - b).abs().max())


def layer(setting: Setting) -> list[Line]:
    """One layer, 512 tokens: over the plain linear, with the routing's own time beside it."""
    lines = []
    for threads in setting.threads:
        torch.set_num_threads(threads)
        for count, target in zip(setting.adapters, ("≤ 1.06", "≤ 1.10", "≤ 1.22"), strict=True):
            model, names = adapted(setting.width, count)
            x = torch.randn(TOKENS, setting.width)
            ours, loop = mixed(model, names, x), one_by_one(model, names, x, base=True)
            agree(ours(), loop())
            weight = model[0].weight

            def plain(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                return F.linear(x, weight)

            times = interleaved({"ours": ours, "plain": plain, "loop": loop}, rounds=setting.rounds(40))
            found = interleaved({"routing": lambda names=names: Routing(names).plan(tuple(sorted(set(names))), TOKENS)}, rounds=5)
            low, high = times.spread("ours", "plain")
            note = (
                f"middle half {low:.3f} to {high:.3f}; {1000 * times.median('ours'):.1f} ms; a loop over adapters "
                f"{times.ratio('loop', 'plain'):.3f}; routing once a batch {1000 * found.median('routing'):.2f} ms"
            )
            what = f"layer of {setting.width}², r={R}, fp32, {TOKENS} tokens, {count} adapters / plain linear"
            lines.append(Line(what, threads, times.ratio("ours", "plain"), target if threads == 2 or setting.quick else "", note))
    return lines


def part(setting: Setting) -> list[Line]:
    """The adapter's part alone, 16 bits, against a loop over adapters."""
    lines = []
    for threads in setting.threads:
        torch.set_num_threads(threads)
        for dtype, target in ((torch.bfloat16, "≥ 2.0"), (torch.float32, "")):
            count = setting.most
            model, names = adapted(setting.width, count, dtype)
            x = torch.randn(TOKENS, setting.width, dtype=dtype)
            loop = one_by_one(model, names, x, base=False)
            plan = Plan.of([1] * TOKENS, names, tuple(sorted(set(names))), "cpu")
            parts = [model[0].adapters[n] for n in sorted(set(names))]
            a, b = torch.stack([p.lora_A.detach() for p in parts]), torch.stack([(p.lora_B.T * p.scaling).detach() for p in parts])
            way = chosen(plan, a, b)

            def ours(way: str = way, x: Tensor = x, a: Tensor = a, b: Tensor = b, plan: Plan = plan) -> Tensor:
                with torch.no_grad():
                    return WAYS[way](torch.zeros(TOKENS, b.shape[2], dtype=x.dtype), x, a, b, plan, True)  # noqa: FBT003

            agree(ours().float(), loop().float(), 0.05 if dtype == torch.bfloat16 else 1e-4)
            times = interleaved({"ours": ours, "loop": loop}, rounds=setting.rounds(20))
            note = f"{1000 * times.median('loop'):.1f} ms and {1000 * times.median('ours'):.1f} ms ({way})"
            name = str(dtype).removeprefix("torch.")
            what = f"adapter part alone, {count} adapters, {TOKENS} tokens, {name}: loop over adapters / ours"
            lines.append(Line(what, threads, times.ratio("loop", "ours"), target, note))
    return lines


def against_peft(setting: Setting) -> list[Line]:
    """PEFT's mixed batch (`adapter_names`): one layer with and without the base's product, and a token of the embedded base."""
    lines = []
    for count, target in zip(setting.adapters[1:], ("≥ 1.5", "≥ 4"), strict=True):
        model, names = adapted(setting.width, count)
        x, theirs = torch.randn(TOKENS, setting.width), in_peft(model, sorted(set(names)))
        ours = mixed(model, names, x)

        def peft_run(theirs: nn.Module = theirs, x: Tensor = x, names: Sequence[str | None] = names) -> Tensor:
            with torch.no_grad():
                return theirs(x, adapter_names=list(names))

        agree(ours(), peft_run())
        for threads in setting.threads:
            torch.set_num_threads(threads)
            times = interleaved({"ours": ours, "PEFT": peft_run, "base": lambda x=x, m=model: m[0].base(x)}, rounds=setting.rounds(20))
            base = times.median("base")
            own = (times.median("PEFT") - base) / max(1e-9, times.median("ours") - base)
            what = f"layer of {setting.width}², {count} adapters, {TOKENS} tokens: PEFT / ours"
            note = f"{1000 * times.median('PEFT'):.1f} and {1000 * times.median('ours'):.1f} ms; the base's product {1000 * base:.1f}"
            lines.append(Line(what, threads, times.ratio("PEFT", "ours"), target, note))
            lines.append(Line(f"{what}, less the base's product", threads, round(own, 3), target))
        lines += token_against_peft(setting, count, target)
    return lines


def in_peft(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same weights under PEFT."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(model[0].base), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        for name in names:
            layer.lora_A[name].weight.copy_(model[0].adapters[name].lora_A)
            layer.lora_B[name].weight.copy_(model[0].adapters[name].lora_B)
    return theirs.eval()


def token_against_peft(setting: Setting, count: int, target: str) -> list[Line]:
    """A batch of as many rows as adapters, each its own, one token further."""
    model, _ = ln.load("tiny", device="cpu")
    rows = max(count, 16)
    names = carry(model, count, "all-linear")
    whose: list[str | None] = [names[i % count] for i in range(rows)]
    theirs_base, _ = ln.load("tiny", device="cpu")
    config = peft.LoraConfig(r=8, lora_alpha=ALPHA, target_modules=TARGETS)
    theirs = peft.get_peft_model(theirs_base, config, adapter_name=names[0]).eval()
    for name in names[1:]:
        theirs.add_adapter(name, config)
    with torch.no_grad():
        for path, layer in layers(model):
            other = theirs.base_model.model.get_submodule(path)
            for name in names:
                other.lora_A[name].weight.copy_(layer.adapters[name].lora_A)
                other.lora_B[name].weight.copy_(layer.adapters[name].lora_B)
    ids = torch.randint(5, 6000, (rows, 1))
    routing, tied, chosen = Routing(whose), {"input_ids": ids, "use_cache": False}, [m for _, m in layers(model)]

    def ours() -> Tensor:
        for layer in chosen:  # as `rows` does it, which looks for the layers once a batch
            layer.__dict__["routing"] = routing
        with torch.no_grad():
            return model(**tied).logits

    def peft_run() -> Tensor:
        with torch.no_grad():
            return theirs(**tied, adapter_names=list(whose)).logits

    agree(ours(), peft_run())
    lines, what = [], f"one token of the embedded base, {rows} rows, {count} adapters: PEFT / ours"
    for threads in setting.threads:
        torch.set_num_threads(threads)
        times = interleaved({"ours": ours, "PEFT": peft_run}, rounds=setting.rounds(10), warm_up=1)
        note = f"{1000 * times.median('PEFT'):.1f} and {1000 * times.median('ours'):.1f} ms"
        lines.append(Line(what, threads, times.ratio("PEFT", "ours"), target, note))
    return lines


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def carry(model: nn.Module, count: int, targets: str | list[str]) -> list[str]:
    """Put so many adapters of rank 8 on a model, none of which trains; their names."""
    names = [f"a{i:03}" for i in range(count)]
    for i, name in enumerate(names):
        ln.attach(model, ln.LoraConfig(r=8, lora_alpha=ALPHA, target_modules=targets), name)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, p in ln.parameters(model, name).items():
                if key.endswith("lora_B"):
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    ln.set_active(model, [])
    return names


def decoding(model: nn.Module, whose: Sequence[str | None]) -> Callable[[], None]:
    """One token further for a batch of texts, 50 tokens long, each with its adapter."""
    kept, chosen, shares = KeyValues(len(whose)), [m for _, m in layers(model)], {}
    with torch.no_grad():
        forward(model, Pass([Row(name, list(range(5, 55)), i) for i, name in enumerate(whose)], kept))

    def run() -> None:
        batch = Pass([Row(name, [7], i, 50) for i, name in enumerate(whose)], kept)
        with torch.no_grad(), sent(chosen, batch, shares):
            forward(model, batch, routed=True)

    return run


def active(setting: Setting) -> list[Line]:
    """A batch of 32 of the embedded base: ten more active adapters, and the naive loop, a forward for each adapter."""
    lines = []
    model, _ = ln.load("tiny", device="cpu")
    rows = 32
    names = carry(model, 16, "all-linear")
    for threads in setting.threads:
        torch.set_num_threads(threads)
        variants = {f"{n}": decoding(model, [names[i % n] for i in range(rows)]) for n in (1, 6, 11, 16)}
        loops = {n: [decoding(model, [names[k]] * len(range(k, rows, n))) for k in range(n)] for n in (1, 11)}
        variants |= {f"loop {n}": (lambda runs=runs: [run() for run in runs]) for n, runs in loops.items()}
        variants["base"] = decoding(model, [None] * rows)
        times = interleaved(variants, rounds=setting.rounds(40))
        note = "; ".join(f"{n} adapters {1000 * times.median(str(n)):.1f} ms" for n in (1, 6, 11, 16))
        note += f"; base {1000 * times.median('base'):.1f} ms; middle half {times.spread('11', '1')}"
        what = "latency of a token, batch of 32, embedded base: 11 active adapters / 1"
        lines.append(Line(what, threads, times.ratio("11", "1"), "≤ 1.15", note))
        lines.append(
            Line(f"{what}, a forward for each adapter", threads, times.ratio("loop 11", "loop 1"), "", "the naive loop, for comparison")
        )
        lines.append(Line("the same, 11 active adapters: a forward for each / ours", threads, times.ratio("loop 11", "11")))
    return lines


def loaded(setting: Setting) -> list[Line]:
    """Tokens a second of a server whose 16 places are always taken, by how many adapters the requests are for."""
    with tempfile.TemporaryDirectory() as place:
        folder, most = Path(place), 12 if setting.quick else 237
        model, _ = ln.load("tiny", device="cpu")
        for i in range(most):
            ln.attach(model, ln.LoraConfig(r=8, lora_alpha=ALPHA), f"a{i:03}")
            with torch.no_grad():
                for key, p in ln.parameters(model).items():
                    if key.endswith("lora_B"):
                        p.normal_(std=0.02)
            ln.save(model, folder / f"a{i:03}")
            ln.detach(model)
        lines = []
        for threads in setting.threads:
            torch.set_num_threads(threads)
            counts = (5, 8, 12) if setting.quick else (5, 16, 237)
            speeds: dict[int, list[float]] = {count: [] for count in counts}
            for turn in range(1 if setting.quick else 2):
                for count in counts[turn % len(counts) :] + counts[: turn % len(counts)]:
                    speeds[count].append(throughput(folder, count, 24 if setting.quick else 64, 16 if setting.quick else 48))
            medians = {count: statistics.median(values) for count, values in speeds.items()}
            note = ", ".join(f"{count} adapters {speed:,.0f}" for count, speed in medians.items()) + " tokens/s"
            what = f"tokens a second, 16 texts at a time, {counts[-1]} loaded adapters / {{}}"
            last = medians[counts[-1]]
            lines.append(Line(what.format(counts[0]), threads, round(last / medians[counts[0]], 4), "≥ 0.9", note))
            said = "both with 16 adapters in a batch"
            lines.append(Line(what.format(counts[1]), threads, round(last / medians[counts[1]], 4), "", said))
        return lines


def throughput(folder: Path, count: int, requests: int, tokens: int) -> float:
    """Of requests for `count` adapters in turn, all of which are in host memory before."""
    model, tokenizer = ln.load("tiny", device="cpu")
    with ln.AdapterServer(model, tokenizer, 32, 256, folder=folder, max_batch=16, max_queue=10_000) as server:
        names = [f"a{i:03}" for i in range(count)]
        for ticket in [server.submit("The old man", name, max_new_tokens=1) for name in names]:
            ticket.result(120)
        start = time.perf_counter()
        tickets = [server.submit("The old man opened the door and", names[i % count], max_new_tokens=tokens) for i in range(requests)]
        written = sum(ticket.result(300).tokens for ticket in tickets)
        return written / (time.perf_counter() - start)


def beside(setting: Setting) -> list[Line]:
    """A forward shared by texts being written and rows that train, against one of each in turn."""
    lines = []
    model, tokenizer = ln.load("tiny", device="cpu")
    names = carry(model, 17, "all-linear")
    ln.set_active(model, names[-1])
    blocks = ln.dataset("tone").encode(tokenizer, 256)
    for threads in setting.threads:
        torch.set_num_threads(threads)
        for rows in (1, 4) if not setting.quick else (1,):
            train = [Row(names[-1], b.input_ids, wanted=range(len(b.input_ids) - 1)) for b in blocks[:rows]]
            kept, chosen, shares = KeyValues(16), [m for _, m in layers(model)], {}
            with ln.disabled(model), torch.no_grad():
                forward(model, Pass([Row(names[i], list(range(5, 55)), i) for i in range(16)], kept))
            serve = [Row(names[i], [7], i, 50) for i in range(16)]
            variants = {
                "together": sharing(model, [*serve, *train], kept, chosen, train),
                "training": sharing(model, train, kept, chosen, train),
                "serving": served(model, serve, kept, chosen, shares),
            }
            times = interleaved(variants, rounds=setting.rounds(30))
            apart = times.median("training") + times.median("serving")
            tokens = sum(len(row.ids) for row in train)
            note = (
                f"together {1000 * times.median('together'):.1f} ms for 16 tokens written and {tokens} trained; in turn "
                f"{1000 * times.median('training'):.1f} + {1000 * times.median('serving'):.1f} ms"
            )
            what = f"training beside serving, {rows} training rows: time in turn / together (both throughputs)"
            lines.append(Line(what, threads, round(apart / times.median("together"), 4), "", note))
    return lines


def sharing(model: nn.Module, rows: list[Row], kept: KeyValues, chosen: list, train: list[Row]) -> Callable[[], None]:
    goals, shares = [torch.tensor(row.ids[1:]) for row in train], {}

    def run() -> None:
        batch = Pass(rows, kept)
        with ln.disabled(model), sent(chosen, batch, shares):
            logits = forward(model, batch, routed=True)[-len(train) :]
        loss = F.cross_entropy(torch.cat(logits), torch.cat(goals))
        model.zero_grad()
        loss.backward()

    return run


def served(model: nn.Module, rows: list[Row], kept: KeyValues, chosen: list, shares: dict) -> Callable[[], None]:
    def run() -> None:
        batch = Pass(rows, kept)
        with torch.no_grad(), sent(chosen, batch, shares):
            forward(model, batch, routed=True)

    return run


def crossover(setting: Setting) -> list[Line]:
    """Each way by number of tokens and adapters, on one core: what `choose` weighs, and how far its choice is from the best."""
    torch.set_num_threads(1)
    lines, losses = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for width in (256,) if setting.quick else (256, 2048):
            for tokens in (8, 32) if setting.quick else (1, 8, 32, 128, 512):
                for count in (g for g in (1, 2, 4, 10, 32, 100) if g <= tokens):
                    times, way = ways(tokens, count, width, dtype, setting.rounds(7))
                    best = min(times, key=lambda name: times[name])
                    losses.append(times[way] / times[best])
                    said = ", ".join(f"{way} {1e6 * t:.0f}" for way, t in times.items())
                    what = f"{str(dtype)[6:]}, {width}², {tokens} tokens, {count} adapters: chosen / best"
                    lines.append(Line(what, 1, round(losses[-1], 3), "", f"{said} µs; chosen {way}"))
    lines.append(Line("chosen / best, the median of all", 1, round(statistics.median(losses), 3), "", f"worst {max(losses):.2f}; {COSTS}"))
    return lines


def ways(tokens: int, count: int, width: int, dtype: torch.dtype, rounds: int) -> tuple[dict[str, float], str]:
    torch.manual_seed(0)
    a, b = (torch.randn(count, R, width, dtype=dtype) * 0.05 for _ in range(2))
    names = [f"a{i}" for i in range(count)]
    whose = [*names, *(names[int(i)] for i in torch.randint(count, (tokens - count,)))]
    plan = Plan.of([1] * tokens, [whose[int(i)] for i in torch.randperm(tokens)], tuple(names), "cpu")
    x, y = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)

    def run(way: str) -> Callable[[], object]:
        def once() -> None:
            with torch.no_grad():
                WAYS[way](y, x, a, b, plan, True)  # noqa: FBT003

        return once

    times = interleaved({way: run(way) for way in WAYS}, rounds=rounds, repeat=3)
    return {way: times.median(way) for way in WAYS}, chosen(plan, a, b)


def disk(setting: Setting) -> list[Line]:
    """Bytes of n adapters against n models, and what fewer bits lose: of the held-out loss after training on tone."""
    torch.set_num_threads(max(setting.threads))
    model, tokenizer = ln.load("tiny", device="cpu")
    ln.attach(model, ln.LoraConfig(r=8, lora_alpha=16))
    data = ln.dataset("tone")
    steps = 2 if setting.quick else 60
    ln.train(model, tokenizer, data, ln.TrainConfig(max_steps=steps, batch_size=16, seq_len=128, learning_rate=5e-3))
    held = ln.dataset("tone", "test")[: 20 if setting.quick else 200]
    lines = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ln.save(model, folder / "fp32")
        base = sum(p.stat().st_size for p in (Path(ln.__file__).parent / "tiny").glob("*.safetensors"))
        losses, sizes, weights = {}, {}, {}
        for kind in ("fp32", "fp16", "bf16", "int8"):
            path = folder / kind if kind == "fp32" else ln.store(folder / "fp32", folder / kind, kind)
            other, _ = ln.load("tiny", device="cpu")
            ln.load_adapter(other, path)
            losses[kind] = ln.evaluate(other, tokenizer, held, seq_len=128).loss
            sizes[kind], weights[kind] = ln.storage([path]).total, read_folder(path).tensors
        for kind, size in sizes.items():
            n = 237
            both, models = (f"{b / 2**20:.0f} MiB" for b in (n * size + base, n * base))
            note = f"{size:,} bytes each, the base {base:,}; {n} adapters and one base: {both}, {n} models: {models}"
            lines.append(Line(f"a whole model of bf16 / an adapter of {kind}, bytes on disk", None, round(base / size, 2), "", note))
        for kind in ("fp16", "bf16", "int8"):
            error = max(float((weights[kind][k].float() - t).norm() / t.norm()) for k, t in weights["fp32"].items())
            note = f"{losses[kind]:.6f} after {losses['fp32']:.6f}; largest relative error of a matrix {error:.1e}"
            lines.append(Line(f"held-out loss on tone, {kind} / fp32", None, round(losses[kind] / losses["fp32"], 6), "", note))
    return lines


SECTIONS: dict[str, Callable[[Setting], list[Line]]] = {
    "layer": layer,
    "part": part,
    "peft": against_peft,
    "active": active,
    "loaded": loaded,
    "beside": beside,
    "crossover": crossover,
    "disk": disk,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    setting = Setting(options.quick, tuple(options.threads))
    found = json.loads(options.out.read_text())["sections"] if options.out.exists() else {}
    for name in options.only:
        lines = SECTIONS[name](setting)
        rows = [{**asdict(line), "met": line.met} for line in lines]
        found[name] = {"machine": {**machine(), "peft": peft.__version__}, "rows": rows}
        for line in lines:
            print(f"{line.measure} | {line.threads} threads | {line.value} | {line.target} {line.met} | {line.note}", flush=True)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps({"sections": {s: found[s] for s in SECTIONS if s in found}}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
