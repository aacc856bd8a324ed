"""The package on a CUDA GPU, from end to end: what is proven in detail on a CPU holds there, too. Under two minutes in all."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_nb as ln
from lora_nb.attach import weights
from lora_nb.fusing import fused
from lora_nb.layers.kernels import kernel, tried
from lora_nb.layers.linear4bit import Linear4bit
from lora_nb.layers.lora_linear import lora_linear
from lora_nb.layers.nf4 import dequantize, quantize
from lora_nb.training.loss import loss_sum, token_losses
from tests.models import fill, tiny_gpt2, tiny_llama, token_ids
from tests.text import PAIRS, byte_llama, byte_tokenizer

pytestmark = pytest.mark.gpu
TOKENIZER = byte_tokenizer()
LORA = ln.LoraConfig(r=8, lora_alpha=20, target_modules="all-linear")


def adapted(device: str, config: ln.LoraConfig | ln.BottleneckConfig = LORA) -> nn.Module:
    """The same model and adapter on any device."""
    model = byte_llama()
    torch.manual_seed(0)
    ln.attach(model, config)
    return model.to(device)


def trained(device: str, config: ln.LoraConfig | ln.BottleneckConfig = LORA, callbacks=(), **changes):
    settings = {"max_steps": 8, "batch_size": 4, "seq_len": 64, "learning_rate": 3e-3} | changes
    return ln.train(adapted(device, config), TOKENIZER, PAIRS, ln.TrainConfig(**settings), callbacks=callbacks)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids().to(next(model.parameters()).device)).logits.float().cpu()


@pytest.mark.parametrize("name", ["nf4_triton", "cross_entropy_triton", "lora_triton", "mixed_triton"])
def test_the_kernels_are_those_of_pytorch(name: str) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    device = torch.empty(0, device="cuda").device
    assert tried(name, device)[1] == ""
    assert kernel(name, device) is not None


# ---- training --------------------------------------------------------------------------------------------------------

METHODS = {
    "LoRA": LORA,
    "DoRA": ln.LoraConfig(r=4, lora_alpha=12, use_dora=True),
    "bottleneck": ln.BottleneckConfig.pfeiffer(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, {"packing": True, "batch_size": 1}, {"gradient_checkpointing": True}], ids=str)
def test_in_32_bits_the_losses_are_those_of_a_cpu(method: str, changes: dict) -> None:
    on_gpu, on_cpu = (trained(device, METHODS[method], precision="fp32", **changes).losses for device in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_it_learns_the_same_to_rounding(precision: str) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("a GPU without bfloat16")
    on_gpu, on_cpu = trained("cuda", precision=precision, max_steps=20), trained("cpu", max_steps=20)
    assert on_gpu.losses[-1] == pytest.approx(on_cpu.losses[-1], rel=0.1)
    assert on_gpu.losses[-1] < on_gpu.losses[0]
    assert on_gpu.peak_memory > 0


def test_the_default_is_16_bits_with_an_adapter_in_32() -> None:
    model = adapted("cuda").to(torch.bfloat16)
    for part in weights(model, "default").values():
        part.float()
    run = ln.train(model, TOKENIZER, PAIRS, ln.TrainConfig(max_steps=20, batch_size=4, seq_len=64, learning_rate=3e-3))
    assert run.losses[-1] < run.losses[0]
    assert {p.dtype for p in ln.parameters(model).values()} == {torch.float32}


def test_dropout_is_drawn_from_seed_and_step() -> None:
    config = ln.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.3)
    once, twice, plain = trained("cuda", config), trained("cuda", config), trained("cuda", ln.LoraConfig(r=4, lora_alpha=12))
    assert once.losses == pytest.approx(twice.losses, rel=1e-5)
    assert once.losses != pytest.approx(plain.losses, rel=1e-5)


def test_a_loss_in_chunks_is_the_loss_of_all_logits() -> None:
    model, ids = adapted("cuda"), torch.randint(3, 250, (3, 40), device="cuda")
    labels = ids.masked_fill(ids % 3 == 0, -100)
    grads = []
    for loss in (loss_sum(model, ids, labels), token_losses(model, ids, labels)[0].sum()):
        own = list(ln.parameters(model).values())
        grads.append([loss.detach(), *torch.autograd.grad(loss, own)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"packing": True, "batch_size": 1}, {"precision": "fp16"}], ids=str)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, changes: dict) -> None:
    """A last digit is left to those of PyTorch's kernels that do not repeat to the bit."""
    places = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    whole = trained("cuda", **changes)
    assert trained("cuda", callbacks=[lambda step: step.step == 3], **places, **changes).steps == 3
    torch.manual_seed(99)  # what was drawn meanwhile does not matter
    again = trained("cuda", resume=True, **places, **changes)
    assert again.steps == 8
    assert again.losses == pytest.approx(whole.losses, rel=1e-5)


# ---- four bits -------------------------------------------------------------------------------------------------------


def test_four_bits_are_those_of_a_cpu() -> None:
    on_cpu, on_gpu = (tiny_llama().to(device) for device in ("cpu", "cuda"))
    for model in (on_cpu, on_gpu):
        ln.quantize(model, ln.QuantConfig(quant_type="nf4", compute_dtype=torch.float32))
    mine, theirs = on_gpu.state_dict(), on_cpu.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key].cpu(), theirs[key]) for key in mine)
    torch.testing.assert_close(logits(on_gpu), logits(on_cpu), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "bnb-nf4"])
def test_over_four_bits_an_adapter_learns(kind: str) -> None:
    model, tokenizer = ln.load("tiny", quant=kind, device="cuda")
    ln.attach(model, LORA)
    run = ln.train(model, tokenizer, ln.dataset("tone")[:64], ln.TrainConfig(max_steps=12, batch_size=8, seq_len=64, learning_rate=2e-3))
    assert sum(run.losses[-3:]) < sum(run.losses[:3])


def over_four_bits(model: nn.Module, *, fuse: bool) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of a step in bf16, and the bytes that autograd keeps between its two passes."""
    ids = torch.randint(3, 250, (4, 128), generator=torch.Generator().manual_seed(0)).cuda()
    with fused(model) if fuse else nullcontext():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_sum(model, ids, ids)
        kept = torch.cuda.memory_allocated() - before
        return [loss.detach(), *torch.autograd.grad(loss, list(ln.parameters(model).values()))], kept


@pytest.mark.parametrize("double", [False, True])
def test_lora_over_four_bits_is_layer_and_adapter_one_after_the_other_and_keeps_less(double: bool) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("a GPU without bfloat16")
    model = ln.load("tiny", quant=ln.QuantConfig(double_quant=double), device="cuda")[0]
    ln.attach(model, LORA)
    fill(model)
    over_four_bits(model.train(), fuse=True)  # the first step measures
    (ours, mine), (theirs, plain) = (over_four_bits(model, fuse=fuse) for fuse in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).abs().max() <= 1e-1 * other.float().abs().max()
    assert mine < plain


# ---- devices, streams, graphs ----------------------------------------------------------------------------------------


def kernels_results(device: str) -> list[torch.Tensor]:
    """Of each kernel as the package reaches it: NF4, a loss, LoRA's product and its gradients."""
    draw = torch.Generator().manual_seed(0)
    w, x, labels = torch.randn(256, 192, generator=draw), torch.randn(600, 192, generator=draw), torch.arange(600) % 256
    low_rank = (torch.full((8, 192), 0.1), torch.ones(256, 8))
    w, x, a, b = (t.to(device, torch.float16).requires_grad_(i > 0) for i, t in enumerate((w, x, *low_rank)))
    y = lora_linear(x, w, None, (a, b, 0.5))
    goals, fast = labels.to(device), kernel("cross_entropy_triton", x.device)
    assert fast is not None
    found = [y, *torch.autograd.grad(y.float().square().sum() / 1000, (x, a, b)), dequantize(quantize(w, double_quant=True))]
    return [t.detach() for t in (*found, *fast.loss_and_gradient(y.detach().clone(), goals))]


def test_on_another_stream_the_results_are_the_same() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    expected, side = kernels_results("cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = kernels_results("cuda")
    side.synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.float().abs().max()))


def test_on_a_gpu_that_is_not_the_current_one_the_results_are_the_same() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    state = torch.cuda.get_rng_state(0)
    found = kernels_results("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(torch.cuda.get_rng_state(0), state)
    for one, other in zip(found, kernels_results("cuda:0"), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-2, atol=1e-2 * float(other.float().abs().max()))


def test_a_cuda_graph_holds_a_layer_in_four_bits() -> None:
    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.float16)
    layer.hold(quantize(torch.randn(128, 256), double_quant=True))
    layer, x = layer.cuda(), torch.randn(4, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        layer(x)  # tries the kernel
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn(4, 256))
        graph.replay()
        torch.testing.assert_close(y, layer(x))


# ---- many adapters ---------------------------------------------------------------------------------------------------


def test_each_row_of_a_batch_is_the_row_alone() -> None:
    model, names = byte_llama(), ["one", None, "two", "three", "one"]
    for i, name in enumerate(("one", "two", "three")):
        ln.attach(model, ln.LoraConfig(r=(3, 8, 16)[i], lora_alpha=12), name)
        fill(model, name, seed=i)
    ln.set_active(model, [])
    model.cuda()
    prompts = ["a", "b", "ça va", "a much longer prompt, of many letters", "z"]
    written = ln.generate(model, TOKENIZER, prompts, adapter=names, max_new_tokens=8)
    assert written[2] == ln.generate(model, TOKENIZER, prompts[2], adapter="two", max_new_tokens=8)
    ids = torch.randint(3, 250, (5, 6), device="cuda")
    with torch.no_grad():
        with ln.rows(model, names):
            found = model(ids).logits
        for i, name in enumerate(names):
            ln.set_active(model, name or [])
            torch.testing.assert_close(found[i], model(ids[i : i + 1]).logits[0], rtol=1e-3, atol=1e-3)


def test_rows_of_several_adapters_learn_together() -> None:
    grads = []
    for device in ("cpu", "cuda"):
        model = byte_llama()
        for i, name in enumerate(("one", "two")):
            ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12), name)
            fill(model, name, seed=i)
        ln.set_active(model, ["one", "two"])
        model.to(device)
        with ln.rows(model, ["two", "one", "two"]):
            model(torch.arange(3, 33, device=device).view(3, 10)).logits.square().mean().backward()
        grads.append([p.grad.cpu() for name in ("one", "two") for p in ln.parameters(model, name).values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_computes_the_same_and_back_are_the_same_bytes(make, dtype: torch.dtype) -> None:
    model = make().to("cuda", dtype)
    ln.attach(model, LORA)
    fill(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unmerged = logits(model)
    ln.merge(model)
    assert (logits(model) - unmerged).abs().max() <= (1e-3 if dtype == torch.float32 else 5e-2) * unmerged.abs().max()
    ln.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_merged_into_four_bits_and_back() -> None:
    model = tiny_llama().cuda()
    ln.quantize(model, ln.QuantConfig(quant_type="nf4", compute_dtype=torch.float32))
    ln.attach(model, LORA)
    fill(model)
    before, unmerged = copy.deepcopy(model.state_dict()), logits(model)
    ln.merge(model, into="dequantized")
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-3, atol=1e-3)
    ln.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_from_a_gpu_is_read_on_a_cpu(tmp_path: Path) -> None:
    model, other = adapted("cuda"), byte_llama()
    fill(model)
    ln.save(model, tmp_path)
    ln.load_adapter(other, tmp_path)
    for name, p in ln.parameters(other).items():
        assert torch.equal(p, ln.parameters(model)[name].cpu())
