"""Ranks by module at the same number of parameters: one rank for all, `find_rank`'s, and AdaLoRA's (Zhang et al., 2023, arXiv:2303.10512).

    python benchmarks/budgets.py [--quick] [--only tone stdlib] [--out FILE]        writes benchmarks/results/budgets.json

The embedded base, all linear layers. The budget is what rank 8 for all takes. One run at rank 64 says how `find_rank` would spend it; a
fresh adapter is trained with these ranks. AdaLoRA is Hugging Face PEFT's: it starts at rank 12 and comes down to 8 on average, with the
tenth of the steps before and the third after that its authors leave it. All are trained by the same loop on the same batches; each method's
rate is the best of four on half of the held-out blocks, and the other half is reported. One thread, three seeds.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import random
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from measure import RESULTS, machine
from torch import nn

import lora_nb as ln
from lora_nb.blocks import batches
from lora_nb.rank.budget import allocate, budget
from lora_nb.training.loss import token_losses
from lora_nb.training.optim import make_optimizer, set_rates

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # a name that PEFT 0.21 still reads
RANK, START, MOST, ALPHA = 8, 12, 64, 32
RATES, SEEDS, REPORTED = (1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2), 16_000  # held-out tokens, both halves together
TEXTS = {"tone": {"max_steps": 120, "batch_size": 16, "seq_len": 128}, "stdlib": {"max_steps": 80, "batch_size": 8, "seq_len": 128}}
Blocks = list[Any]


def halves(name: str, tokenizer: Any, seq_len: int) -> tuple[Blocks, Blocks]:
    """Held-out blocks to choose the rate by, and others to report."""
    blocks = ln.dataset(name, "test").encode(tokenizer, seq_len)
    chosen = blocks[:: max(1, sum(len(b.input_ids) for b in blocks) // REPORTED)]
    return chosen[::2], chosen[1::2]


def trained(model: nn.Module, blocks: Blocks, config: ln.TrainConfig, after: Callable[[int], None] = lambda _: None) -> nn.Module:
    """One loop for all: batches in random order, AdamW, the package's schedule. `after` gets each step while its gradients are there."""
    optimizer, steps = make_optimizer(model, config), config.max_steps or 1
    order = [i for turn in range(steps) for i in random.Random(1000 * config.seed + turn).sample(range(len(blocks)), len(blocks))]
    model.train()
    for step, (ids, labels) in enumerate(batches(blocks, config.batch_size, 0, order[: steps * config.batch_size])):
        set_rates(optimizer, config, step, steps)
        losses, *_ = token_losses(model, ids, labels)
        loss = losses.mean()
        if isinstance(model, peft.PeftModel):
            loss = loss + orthogonality(model)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        after(step)
        optimizer.zero_grad()
    return model.eval()


def orthogonality(model: peft.PeftModel) -> torch.Tensor:
    """AdaLoRA's penalty, the mean distance of its singular vectors from orthogonal, at PEFT's weight; PEFT adds it to a loss of its own."""
    found = []
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            gram = p @ p.T if "lora_A" in name else p.T @ p
            found.append((gram - torch.eye(len(gram))).norm())
    return model.peft_config["default"].orth_reg_weight * torch.stack(found).mean()


def loss_of(model: nn.Module, blocks: Blocks) -> float:
    """Held-out nats a token."""
    sums = tokens = 0.0
    with torch.no_grad():
        for ids, labels in batches(blocks, 16, 0, range(len(blocks))):
            losses, *_ = token_losses(model, ids, labels)
            sums, tokens = sums + float(losses.double().sum()), tokens + len(losses)
    return sums / tokens


def lora(ranks: Mapping[str, int] | None, blocks: Blocks, config: ln.TrainConfig, r: int = RANK) -> nn.Module:
    """A fresh adapter of these ranks; the scale is that of one rank for all in every module."""
    torch.manual_seed(config.seed)
    model, _ = ln.load("tiny", device="cpu")
    pattern = dict(ranks or {})
    alphas = {path: ALPHA * k / r for path, k in pattern.items()}
    ln.attach(model, ln.LoraConfig(r=r, lora_alpha=ALPHA, target_modules="all-linear", rank_pattern=pattern, alpha_pattern=alphas))
    return trained(model, blocks, config)


def adalora(blocks: Blocks, config: ln.TrainConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    base, _ = ln.load("tiny", device="cpu")
    steps = config.max_steps or 1
    schedule = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": 1, "total_step": steps}
    names = sorted({path.rpartition(".")[2] for path, m in base.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"})
    model = peft.get_peft_model(
        base, peft.AdaLoraConfig(init_r=START, target_r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM", **schedule)
    )
    return trained(model, blocks, config, model.base_model.update_and_allocate)


def parameters(model: nn.Module) -> int:
    """That are in use: AdaLoRA's directions of value zero could be left out of a file."""
    if not isinstance(model, peft.PeftModel):
        return sum(p.numel() for p in ln.parameters(model).values())
    kept = 0
    for m in model.modules():
        if isinstance(m, peft.tuners.adalora.SVDLinear):
            kept += int((m.lora_E["default"] != 0).sum()) * (m.in_features + m.out_features)
    return kept


def text(name: str, *, quick: bool) -> dict[str, Any]:
    """All methods on one text: the rate of each, its losses by seed, its parameters."""
    settings = TEXTS[name] | ({"max_steps": 12} if quick else {})
    rates, seeds = (RATES[:1], SEEDS[:1]) if quick else (RATES, SEEDS)
    _, tokenizer = ln.load("tiny", device="cpu")
    train = ln.dataset(name).encode(tokenizer, settings["seq_len"])
    choose, report = halves(name, tokenizer, settings["seq_len"])
    high = lora(None, train, ln.TrainConfig(**settings, learning_rate=RATES[1]), MOST)
    found = ln.find_rank(model=high, tokenizer=tokenizer, eval_dataset=ln.dataset(choose)).directions
    ranks = allocate(found, budget(found, RANK))
    methods: dict[str, Callable[[ln.TrainConfig], nn.Module]] = {
        "one rank": lambda config: lora(None, train, config),
        "find_rank's ranks": lambda config: lora(ranks, train, config),
        "AdaLoRA": lambda config: adalora(train, config),
    }
    rows: dict[str, Any] = {}
    for method, run in methods.items():
        by = {rate: run(ln.TrainConfig(**settings, learning_rate=rate, seed=0)) for rate in rates}
        rate = min(rates, key=lambda rate: loss_of(by[rate], choose))
        models = [by[rate], *(run(ln.TrainConfig(**settings, learning_rate=rate, seed=seed)) for seed in seeds[1:])]
        losses = [round(loss_of(model, report), 5) for model in models]
        rows[method] = {"rate": rate, "losses": losses, "median": statistics.median(losses), "parameters": parameters(models[0])}
        print(name, method, rows[method], flush=True)
    untouched, _ = ln.load("tiny", device="cpu")
    return {"base": round(loss_of(untouched, report), 5), "ranks": [min(ranks.values()), max(ranks.values())], "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; writes only with --out")
    parser.add_argument("--only", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out or (None if args.quick else RESULTS / "budgets.json")
    content = json.loads(path.read_text()) if path and path.exists() else {}
    for name in args.only:
        content[name] = {"machine": machine() | {"peft": peft.__version__}, **text(name, quick=args.quick)}
        if path:
            path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
