"""What is compared: models of known shape, ours and Hugging Face PEFT's around the same weights, and the steps that each makes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lora_nb as ln

LORA = {"r": 8, "lora_alpha": 20.0, "target_modules": "all-linear"}
SHAPES: dict[str, dict[str, Any]] = {
    "27M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 4096},
    "27M, 32k": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000},
    "124M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50257},
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "quick": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6144},
}

Step = Callable[[], object]


class Missing(Exception):  # noqa: N818 - not a failure
    """What a measurement needs is not here."""


def llama(shape: str, device: str = "cpu") -> nn.Module:
    """A random Llama; fp32 on a CPU, bf16 on a GPU, and made there. The embedded base itself for 5.8M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape == "5.8M":
        return ln.load("tiny", device=device)[0]
    torch.manual_seed(0)
    config = LlamaConfig(**{"tie_word_embeddings": True, "max_position_embeddings": 2048} | SHAPES[shape])
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16).eval()


def sharing(model: nn.Module) -> nn.Module:
    """Another model of the same weights, not copied: neither peer's are nearer to the processor."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def adapted(base: nn.Module, ids: Tensor, r: int = 8, theirs: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's around the same weights and adapter, shown to give the same logits.

    Args:
        theirs: what PEFT gets instead of `base`, such as the same weights in bitsandbytes' layers.
    """
    ours = sharing(base)
    ln.attach(ours, ln.LoraConfig(**LORA | {"r": r}))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, p in ln.parameters(ours).items():
            if name.endswith("lora_B"):
                p.normal_(std=0.01)
        ln.save(ours, folder)
        theirs = peft.PeftModel.from_pretrained(sharing(theirs or base), folder, is_trainable=True)
        mine, other, plain = (m(input_ids=ids[:1], use_cache=False).logits.float() for m in (ours, theirs, base))
    rounding = 1e-4 if base.dtype == torch.float32 else 5e-2
    if (mine - other).abs().max() > rounding * other.abs().max() or torch.equal(mine, plain):
        raise SystemExit("Ours and PEFT's do not compute the same: nothing is measured.")
    return ours, theirs


def our_steps(model: nn.Module, ids: Tensor) -> Step:
    """The public loop over rows like `ids`, (batch, seq)."""
    rows = ln.dataset([ln.datasets.Block(row, row) for row in ids.tolist()])
    settings = {"batch_size": len(ids), "seq_len": ids.shape[1], "learning_rate": 1e-5, "max_grad_norm": None}
    turns = ln.steps(model, ln.load("tiny", device="cpu")[1], rows, ln.TrainConfig(max_steps=10**6, **settings))
    return partial(next, turns)


def peft_steps(model: nn.Module, ids: Tensor) -> Step:
    """The usual loop around transformers' own loss, with the same optimizer. In 16 bits under autocast, which is PEFT's faster way."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True)
    ids = ids.to(model.device)
    model.train()

    def step() -> None:
        with nullcontext() if model.dtype == torch.float32 else torch.autocast(ids.device.type, model.dtype):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())

    return step


def floor_steps(model: nn.Module, ids: Tensor) -> Step:
    """The frozen model, forward and backward to the embeddings: what no adapter's training in plain PyTorch can be faster than."""
    ids, model = ids.to(model.device), model.requires_grad_(requires_grad=False).train()

    def step() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    return step


def our_epoch(model: nn.Module, tokenizer: Any, data: ln.Dataset, pairs: int) -> Step:
    """One epoch of `ln.train` at its defaults but for the batch size: pairs of like length share a batch, so little is padded."""
    return partial(ln.train, model, tokenizer, data, ln.TrainConfig(num_train_epochs=1, learning_rate=1e-5, batch_size=pairs))


def trainer_epoch(model: nn.Module, tokenizer: Any, blocks: list[Any], pairs: int) -> Step:
    """transformers' Trainer at its defaults but for the batch size; all pairs of a step in one forward, which is to its favour."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = [{"input_ids": b.input_ids, "attention_mask": [1] * len(b.input_ids), "labels": b.labels} for b in blocks]

    def epoch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
            args = TrainingArguments(folder, num_train_epochs=1, per_device_train_batch_size=pairs, use_cpu=True, **quiet)
            trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
            with redirect_stdout(None):  # its summary
                trainer.train()

    return epoch


def next_token(model: nn.Module, ids: Tensor) -> Step:
    cache = model(input_ids=ids, use_cache=True).past_key_values

    def step() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step
