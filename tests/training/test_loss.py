"""The loss is the cross-entropy that everyone else computes, its gradient too; padding has no part in it, nor do all logits at once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

import lora_nb as ln
from lora_nb.blocks import IGNORE, batches, documents
from lora_nb.training import loss as loss_module
from lora_nb.training.loss import Head, loss_sum, output_head, predictions, token_losses
from tests.models import VOCABULARY, fill, peft_twin, tiny_falcon, tiny_gpt2, tiny_llama
from tests.text import PAD, byte_llama, byte_tokenizer

PAIRS = [("a", "b"), ("a longer prompt", "yes"), ("short", "a completion of many letters"), ("é", "ü")]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # logits that a cap can be seen on
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {  # scale and cap of the output head; None where it is not the backbone's last hidden state through one linear layer
    "llama": (tiny_llama, (1.0, None)),
    "llama, tied": (lambda: tiny_llama(tied=True), (1.0, None)),
    "gpt2": (tiny_gpt2, (1.0, None)),
    "falcon": (tiny_falcon, (1.0, None)),
    "gemma 2": (
        lambda: made(Gemma2ForCausalLM, Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0)),
        (1.0, 3.0),
    ),
    "cohere 2": (lambda: made(Cohere2ForCausalLM, Cohere2Config(**SIZES, num_key_value_heads=2, logit_scale=0.25)), (0.25, None)),
    "granite": (lambda: made(GraniteForCausalLM, GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=8.0)), (1 / 8, None)),
    "bert": (lambda: made(BertLMHeadModel, BertConfig(**SIZES, is_decoder=True)), None),
}


def made(kind, config):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return kind(config).eval()


def rows() -> list:
    return ln.dataset(PAIRS).encode(byte_tokenizer(), 64)


def batch(rows: int = 3, length: int = 9, vocabulary: int = VOCABULARY):
    """Ids, and labels that are the ids at two places of three."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.34, IGNORE)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, ids, labels, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Of loss and of all gradients, against the plain way."""
    mine, plain = loss_sum(model, ids, labels), token_losses(model, ids, labels)[0].sum()
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-5)
    grads, theirs = gradients(model, mine), gradients(model, plain)
    assert grads
    torch.testing.assert_close(grads, theirs, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four tokens at once: several chunks for every batch here, the last one not full."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK", 4 * VOCABULARY)


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor made within holds, and the shapes of all that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out

    @property
    def numbers(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


def test_token_losses_by_hand() -> None:
    model = byte_llama()
    ids = torch.tensor([[1, 40, 50, 60], [1, 41, 51, PAD]])
    labels = torch.tensor([[IGNORE, IGNORE, 50, 60], [IGNORE, 41, IGNORE, IGNORE]])
    losses, logits, goals = token_losses(model, ids, labels)
    scores = model(ids).logits.detach().double()

    def nats(row: int, place: int, token: int) -> float:
        """Of a token, from the scores at the place before it."""
        before = scores[row, place - 1]
        return math.log(sum(math.exp(s) for s in before)) - float(before[token])

    expected = torch.tensor([nats(0, 2, 50), nats(0, 3, 60), nats(1, 1, 41)]).double()
    assert goals.tolist() == [50, 60, 41]
    assert logits.shape == (3, 259)
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss_sum(model, ids, labels).double(), expected.sum(), rtol=0, atol=1e-5)


def test_the_mean_is_transformers_own() -> None:
    model = byte_llama()
    for ids, labels in batches(rows(), 3, PAD, range(4)):
        theirs = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        count = (labels[:, 1:] != IGNORE).sum()
        torch.testing.assert_close(token_losses(model, ids, labels)[0].mean(), theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(loss_sum(model, ids, labels) / count, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_transformers_own(name: str) -> None:
    make, shape = HEADS[name]
    model, (ids, labels) = make(), batch()
    count = int((labels[:, 1:] != IGNORE).sum())
    mine, theirs = loss_sum(model, ids, labels), model(input_ids=ids, labels=labels).loss * count
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradients(model, mine), gradients(model, theirs), rtol=1e-4, atol=1e-5)
    head = output_head(model, ids)
    assert (head and (head.scale, head.cap)) == shape


@pytest.mark.parametrize("tokens", [1, 3, 4, 10**6])
@pytest.mark.parametrize("trains", [False, True])
def test_any_size_of_chunk(monkeypatch, tokens: int, trains: bool) -> None:
    monkeypatch.setattr(loss_module, "CPU_CHUNK", tokens * VOCABULARY)
    layer = nn.Linear(32, VOCABULARY).requires_grad_(trains)
    hidden, goals = torch.randn(10, 32, requires_grad=True), torch.randint(VOCABULARY, (10,))
    assert [len(x) for x, _ in Head(layer).chunks(hidden, goals)] == {1: [1] * 10, 3: [3, 3, 3, 1], 4: [4, 4, 2], 10**6: [10]}[tokens]
    inputs = [hidden, *layer.parameters()] if trains else [hidden]
    mine = Head(layer).loss_sum(hidden, goals)
    plain = F.cross_entropy(layer(hidden), goals, reduction="sum")
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)
    for got, expected in zip(torch.autograd.grad(3 * mine, inputs), torch.autograd.grad(3 * plain, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_scale_and_cap_together_with_logits_beyond_the_range_of_exp() -> None:
    layer = nn.Linear(32, VOCABULARY)
    hidden, goals = 1e4 * torch.randn(10, 32), torch.randint(VOCABULARY, (10,))
    for head in (Head(layer), Head(layer, 0.5), Head(layer, 0.5, 30.0)):
        x, y = (hidden.clone().requires_grad_() for _ in range(2))
        mine, plain = head.loss_sum(x, goals), F.cross_entropy(head(y), goals, reduction="sum")
        assert mine.isfinite()
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-5)
        for got, expected in zip(
            torch.autograd.grad(mine, [x, *layer.parameters()]), torch.autograd.grad(plain, [y, *layer.parameters()]), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing() -> None:
    model, blocks = byte_llama(), rows()
    ((ids, labels),) = batches(blocks, len(blocks), PAD, range(len(blocks)))
    assert (ids == PAD).any()
    alone = torch.cat([token_losses(model, torch.tensor([b.input_ids]), torch.tensor([b.labels]))[0] for b in blocks])
    torch.testing.assert_close(token_losses(model, ids, labels)[0], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss_sum(model, ids, labels), alone.sum(), rtol=1e-6, atol=0)


def test_a_batch_without_labels_is_nothing_and_can_be_differentiated() -> None:
    model, (ids, labels) = tiny_llama(), batch()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    fill(model)
    loss = loss_sum(model, ids, torch.full_like(labels, IGNORE))
    assert loss == 0
    grads = gradients(model, loss)
    assert grads
    assert not any(g.any() for g in grads.values())
    losses, guesses, goals = predictions(model, ids, torch.full_like(labels, IGNORE))
    assert (len(losses), len(guesses), len(goals)) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_fp32_over_a_16_bit_model(dtype: torch.dtype) -> None:
    model, (ids, labels) = tiny_llama().to(dtype), batch()
    losses, logits, goals = token_losses(model, ids, labels)
    assert losses.dtype == logits.dtype == loss_sum(model, ids, labels).dtype == torch.float32
    torch.testing.assert_close(losses, logits.logsumexp(-1) - logits.gather(1, goals[:, None])[:, 0])
    assert_same(model, ids, labels, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


def test_the_gradient_of_a_16_bit_head_is_summed_in_fp32() -> None:
    layer = nn.Linear(32, VOCABULARY).bfloat16()
    hidden, goals = torch.randn(800, 32).bfloat16(), torch.randint(VOCABULARY, (800,))
    Head(layer).loss_sum(hidden, goals).backward()  # 200 chunks
    exact = copy.deepcopy(layer).float()
    exact.zero_grad()
    F.cross_entropy(exact(hidden.float()), goals, reduction="sum").backward()
    for got, expected in zip((p.grad for p in layer.parameters()), (p.grad for p in exact.parameters()), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() / expected.norm() < 2**-8  # one rounding at the end; summed in bf16 it is five times that


def test_autocast() -> None:
    model, (ids, labels) = tiny_llama(), batch()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    fill(model)
    with torch.autocast("cpu", torch.bfloat16):
        mine, plain = loss_sum(model, ids, labels), token_losses(model, ids, labels)[0].sum()
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-5)  # the same logits, in bf16
    assert mine != loss_sum(model, ids, labels)
    torch.testing.assert_close(gradients(model, mine), gradients(model, plain), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [tiny_llama, lambda: tiny_llama(tied=True)])
def test_an_adapted_head(kind) -> None:
    model, (ids, labels) = kind(), batch()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "lm_head"]))
    fill(model)
    assert_same(model, ids, labels)
    twin = peft_twin(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "lm_head"]))
    torch.testing.assert_close(loss_sum(model, ids, labels), loss_sum(twin, ids, labels), rtol=1e-6, atol=1e-5)


def test_dropout_of_an_adapted_head_is_the_same_on_the_way_back() -> None:
    model, (ids, labels) = tiny_llama(), batch()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, lora_dropout=0.5, target_modules=["lm_head"]))
    fill(model)
    A = model.lm_head.adapters["default"].lora_A
    model.train()

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return loss_sum(model, ids, labels)

    loss().backward()
    step = A.grad / A.grad.norm()
    with torch.no_grad():
        A += 1e-2 * step
        up = loss()
        A -= 2e-2 * step
        down = loss()
    assert float(up - down) / 2e-2 == pytest.approx(float((A.grad * step).sum()), rel=1e-2)


def test_hooks_on_the_head_are_called() -> None:
    model, (ids, labels) = tiny_llama(), batch()
    loss_sum(model, ids, labels)
    model.lm_head.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    assert_same(model, ids, labels)
    assert_same(copy.deepcopy(model), ids, labels)


@pytest.mark.parametrize("count", ["all", "few"])
def test_all_logits_are_never_there_at_once(count: str) -> None:
    model = byte_llama()
    ids, labels = batch(4, 32, 259)
    if count == "few":
        labels[:, 4:] = IGNORE
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    loss_sum(model, ids, labels)  # tries the head, on eight tokens
    tokens = int((labels[:, 1:] != IGNORE).sum())
    with Largest() as chunked:
        loss_sum(model, ids, labels).backward()
    with Largest() as evaluated:
        predictions(model, ids, labels)
    with Largest() as plain:
        token_losses(model, ids, labels)[0].sum().backward()
    made = {shape[0] for shape in chunked.shapes | evaluated.shapes if shape[1:] == (259,) and shape[0] != 32}  # but Wᵀ
    assert max(made) <= 4 * VOCABULARY // 259 + 1 < tokens
    assert plain.numbers == ids.numel() * 259
    assert chunked.numbers <= ids.numel() * 4 * 48  # of the largest layer
    assert sum(shape == (259, 32) for shape in chunked.shapes) == 0  # a frozen head has no gradient


def test_a_loss_without_gradient() -> None:
    model, (ids, labels) = tiny_llama().requires_grad_(True), batch()
    with torch.no_grad(), Largest() as seen:
        loss = loss_sum(model, ids, labels)
    torch.testing.assert_close(loss, loss_sum(model, ids, labels).detach())
    assert not loss.requires_grad
    assert (VOCABULARY, 32) not in seen.shapes


def test_checkpointing_changes_no_gradient() -> None:
    model, (ids, labels) = tiny_llama(), batch()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    fill(model)
    before = gradients(model, loss_sum(model, ids, labels))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(gradients(model, loss_sum(model, ids, labels)), before, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_micro_batches_are_one_batch(dtype: torch.dtype, off: float) -> None:
    """As far as sums in another order agree in that type: of the whole gradient, since a number that cancels may be off by more."""
    model, (ids, labels) = tiny_llama(), batch(6)
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    fill(model)
    model.to(dtype)
    whole = gradients(model, loss_sum(model, ids, labels))
    parts = gradients(model, sum(loss_sum(model, ids[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)))
    apart, length = (torch.cat([g.flatten() for g in grads]).norm() for grads in ([parts[n] - whole[n] for n in whole], whole.values()))
    assert apart <= off * length


def test_compiled_backbone_and_compiled_whole() -> None:
    ids, labels = batch()
    expected = loss_sum(tiny_llama(), ids, labels)
    backbone = tiny_llama()
    backbone.base_model.compile(backend="eager")
    assert output_head(backbone, ids)
    whole = torch.compile(tiny_llama(), backend="eager")
    inside = tiny_llama()
    inside.compile(backend="eager")
    assert output_head(whole, ids) is output_head(inside, ids) is None  # else what was compiled would not be what runs
    for model in (backbone, whole, inside):
        mine = loss_sum(model, ids, labels)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-5)
        mine.backward()


def test_packed_documents_do_not_see_each_other() -> None:
    model, (ids, labels) = tiny_llama(), batch(1, 12)
    labels[:, [0, 5]] = IGNORE  # the first token of each of the two documents
    places = torch.tensor([[*range(5), *range(7)]])
    apart = loss_sum(model, ids[:, :5], labels[:, :5]) + loss_sum(model, ids[:, 5:], labels[:, 5:])
    for more in ((places,), (places, documents(places))):
        for made in (loss_sum(model, ids, labels, *more), *(f(model, ids, labels, *more)[0].sum() for f in (predictions, token_losses))):
            torch.testing.assert_close(made, apart, rtol=1e-6, atol=1e-5)
    assert abs(loss_sum(model, ids, labels) - apart) > 1e-3


@pytest.mark.parametrize("change", [{"final_logit_softcapping": 30.0}, {"logit_scale": 0.5}, {"logits_scaling": 3.0}])
def test_a_config_that_says_what_the_model_does_not_do(change: dict) -> None:
    model, (ids, labels) = tiny_llama(), batch()
    expected = loss_sum(tiny_llama(), ids, labels)
    vars(model.config).update(change)
    assert output_head(model, ids) is None
    torch.testing.assert_close(loss_sum(model, ids, labels), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(predictions(model, ids, labels)[0].sum(), expected, rtol=1e-6, atol=1e-5)


def test_a_wrapped_model_is_called_whole() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    model, (ids, labels) = tiny_llama(), batch()
    wrapped = Wrapper(model)
    torch.testing.assert_close(loss_sum(wrapped, ids, labels), loss_sum(model, ids, labels), rtol=1e-6, atol=1e-5)
    assert wrapped.calls == 1


def test_hooks_on_the_model_are_called() -> None:
    model, (ids, labels) = tiny_llama(), batch()
    expected, calls = loss_sum(model, ids, labels), []
    hooks = [model.register_forward_hook(lambda *_: calls.append("hook")), model.register_forward_pre_hook(lambda *_: calls.append("pre"))]
    torch.testing.assert_close(loss_sum(model, ids, labels), expected, rtol=1e-6, atol=1e-5)
    assert calls == ["pre", "hook"]
    for hook in hooks:
        hook.remove()
    assert output_head(model, ids)
    model.forward = lambda **inputs: calls.append("own") or type(model).forward(model, **inputs)  # as accelerate does
    torch.testing.assert_close(loss_sum(model, ids, labels), expected, rtol=1e-6, atol=1e-5)
    assert calls[2:] == ["own"]


def test_looking_at_the_head_leaves_no_trace() -> None:
    model, (ids, labels) = byte_llama(dropout=0.5).train(), batch()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert output_head(model, ids)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_hooks
    with Largest() as second:
        output_head(model, ids)
    assert not second.shapes  # once is enough
    assert loss_sum(model, ids, labels).isfinite()


@pytest.mark.parametrize("name", ["llama", "gemma 2", "bert"])
def test_predictions(name: str) -> None:
    model, (ids, labels) = HEADS[name][0](), batch()
    losses, guesses, goals = predictions(model, ids, labels)
    expected, logits, same = token_losses(model, ids, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(guesses, logits.argmax(-1))
    assert torch.equal(goals, same)
    assert not losses.requires_grad
