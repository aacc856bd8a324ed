"""What DoRA costs over LoRA on one linear layer: forward and backward over 1,024 tokens, and one token as in generation.

    python benchmarks/dora.py [--quick] [--only layer decode model exact]        writes benchmarks/results/dora.json

Ours against ours, Hugging Face PEFT's against PEFT's, with the same W, A, B, magnitude and input, whose outputs are first
shown to be equal; also where s·BA cancels 99 % of W, where a norm from ‖W‖², ⟨W, BA⟩ and ‖BA‖² would lose its digits.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from measure import RESULTS, interleaved, machine, write
from torch import Tensor, nn

import lora_nb as ln
from lora_nb.attach import weights

WIDTHS, TOKENS, R, ALPHA = (512, 1024), 1024, 8, 20.0
STEP, DECODE, EXACT = 1.2, 1.5, 1e-5  # at most: of our LoRA's step; of our LoRA's token, and of the base's; relative to the largest output
SECTIONS = ("layer", "decode", "model", "exact")


def layers(width: int, *, dora: bool, cancelling: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The base, ours and PEFT's around the same numbers."""
    torch.manual_seed(width)
    base = nn.Sequential(nn.Linear(width, width, bias=False)).requires_grad_(requires_grad=False)
    if cancelling:
        u, s, v = torch.svd_lowrank(torch.randn(width, R) @ torch.randn(R, width) / width**0.5, q=R)
        base[0].weight.copy_((u * s) @ v.T + 1e-2 * torch.randn(width, width) / width**0.5)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], "use_dora": dora}
    ours, theirs = nn.Sequential(base[0]), peft.get_peft_model(nn.Sequential(base[0]), peft.LoraConfig(**config))
    ln.attach(ours, ln.LoraConfig(**config))
    part, layer = weights(ours, "default")["0"], theirs.base_model.model[0]
    with torch.no_grad():
        if cancelling:
            part.lora_A.copy_(v.T)
            part.lora_B.copy_(-0.99 * (u * s) / part.scaling)
        else:
            part.lora_B.normal_(std=0.02)
        layer.lora_A["default"].weight.copy_(part.lora_A)
        layer.lora_B["default"].weight.copy_(part.lora_B)
        if dora:
            layer.lora_magnitude_vector["default"].weight.copy_(part.magnitude)
    return base, ours, theirs


def errors(width: int, *, cancelling: bool) -> dict[str, float]:
    """The largest error against float64 over the largest value: of the norm; of our output, with gradients and without; of PEFT's."""
    base, ours, theirs = layers(width, dora=True, cancelling=cancelling)
    part, x = weights(ours, "default")["0"], torch.randn(TOKENS, width)
    w = base[0].weight.double() + part.scaling * part.lora_B.detach().double() @ part.lora_A.detach().double()
    norm = w.norm(dim=1)
    exact = x.double() @ (w * (part.magnitude.detach().double() / norm)[:, None]).T
    found = {"norm": (part.norm(ours[0]), norm), "training": (ours.train()(x).detach(), exact)}
    with torch.no_grad():
        found |= {"no gradients": (ours.eval()(x), exact), "one token": (ours(x[:1]), exact[:1]), "PEFT": (theirs(x), exact)}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in found.items()}


def training(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A step: forward, backward, and new values for A, so that no norm can be taken from the step before."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        model(x).sum().backward()
        with torch.no_grad():
            for p in parameters:
                p.add_(0.0)

    return run


def decoding(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def of_a_layer(width: int, rounds: int) -> dict[str, float]:
    _, lora, peft_lora = layers(width, dora=False)
    _, dora, peft_dora = layers(width, dora=True)
    x = torch.randn(TOKENS, width, requires_grad=True)
    assert torch.allclose(dora(x), peft_dora(x), atol=1e-5, rtol=1e-5)
    models = {"lora": lora, "dora": dora, "peft lora": peft_lora, "peft dora": peft_dora}
    times = interleaved({name: training(m.train(), x) for name, m in models.items()}, rounds=rounds)
    return {"ours": times.ratio("dora", "lora"), "peft": times.ratio("peft dora", "peft lora")}


def of_a_token(width: int, rounds: int) -> dict[str, float]:
    base, lora, peft_lora = layers(width, dora=False)
    _, dora, peft_dora = layers(width, dora=True)
    one = torch.randn(1, width)
    models = {"base": base, "lora": lora, "dora": dora, "peft lora": peft_lora, "peft dora": peft_dora}
    times = interleaved({name: decoding(m.eval(), one) for name, m in models.items()}, rounds=rounds, repeat=50)
    return {
        "ours": times.ratio("dora", "lora"),
        "peft": times.ratio("peft dora", "peft lora"),
        **{f"{name} over base": times.ratio(name, "base") for name in ("lora", "dora", "peft lora", "peft dora")},
    }


def whole_models() -> dict[str, Callable[[], None]]:
    """One token after 32 others through a Llama of 8 layers, 512 wide, every linear layer adapted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, bos_token_id=1, eos_token_id=2
    )
    base = LlamaForCausalLM(config).eval()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": names}
    models: dict[str, nn.Module] = {"base": base}
    for kind, dora in (("lora", False), ("dora", True)):
        models[kind] = copy.deepcopy(base)
        ln.attach(models[kind], ln.LoraConfig(**settings, use_dora=dora))
        models[f"peft {kind}"] = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings, use_dora=dora)).eval()
    return {name: one_token(m.eval()) for name, m in models.items()}


def one_token(model: nn.Module) -> Callable[[], None]:
    ids = torch.arange(32)[None] + 5
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return run


def measured(section: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one section at one number of threads."""
    if section == "layer":
        return [row(f"step of a layer, {w} wide", STEP, "ours", of_a_layer(w, rounds), threads) for w in WIDTHS]
    if section == "decode":
        return [row(f"one token of a layer, {w} wide", DECODE, "ours", of_a_token(w, rounds), threads) for w in WIDTHS]
    times = interleaved(whole_models(), rounds=rounds)
    over = {f"{name} over base": times.ratio(name, "base") for name in ("lora", "dora", "peft lora", "peft dora")}
    return [row("one token of a Llama, 512 wide", DECODE, "dora over base", over, threads)]


def row(what: str, target: float, which: str, found: Mapping[str, float], threads: int | None = None) -> dict[str, Any]:
    line = {"what": what, "threads": threads, "target": f"{which} ≤ {target:g}", "met": found[which] <= target, **found}
    print(line)
    return line


def precision() -> list[dict[str, Any]]:
    kinds = {False: "plain", True: "99 % of W cancelled"}
    found = {f"{w} wide, {kinds[c]}": errors(w, cancelling=c) for w in WIDTHS for c in kinds}
    ours = ("training", "no gradients", "one token")
    return [row(what, EXACT, "ours", {"ours": max(e[name] for name in ours), **e}) for what, e in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs; writes nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    args = parser.parse_args()
    rounds, out = 3 if args.quick else 40, RESULTS / "dora.json"
    sections = json.loads(out.read_text()).get("sections", {}) if out.exists() else {}  # those that are not measured now stay
    for section in args.only:
        rows = precision() if section == "exact" else []
        for threads in (1, 2) if section != "exact" else ():
            torch.set_num_threads(threads)
            rows += measured(section, rounds, threads)
        sections[section] = {"machine": machine() | {"peft": peft.__version__}, "rows": rows}
    if not args.quick:
        write("dora", {"sections": sections})


if __name__ == "__main__":
    main()
