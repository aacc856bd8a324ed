"""The same loop in several processes, as `torchrun`, `accelerate launch` or accelerate's `notebook_launcher` start them.

Each process has the model, takes its share of each batch's rows, and adds its gradients to those of the others before the
step (data parallelism). An adapter's gradients are few: one sum of one flat tensor, after the backward pass, is all that is sent.
A base that does not fit one device is divided among them by `shard` first (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from lora_nb.errors import TrainingError


def start() -> tuple[int, int]:
    """Join the other processes, if the launcher says that there are any; this one's number, and how many.

    Call it before `load` on machines with several GPUs: it chooses this process's.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def processes() -> int:
    """How many work on this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Is this the process that writes and talks?"""
    return processes() == 1 or dist.get_rank() == 0


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Each number summed over the processes."""
    if processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(v) for v in total]


def anywhere(*, said: bool, device: torch.device) -> bool:
    """Does any process say so?"""
    return summed([float(said)], device)[0] > 0


def sum_gradients(params: Sequence[nn.Parameter]) -> None:
    """Gradients summed over the processes, in one message; where one process has none, it has zeros."""
    if processes() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in params])
    dist.all_reduce(flat)
    for p, part in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


@torch.no_grad()
def same_start(params: Iterable[nn.Parameter]) -> None:
    """Everyone begins with the first process's values: A is random, and its seed may differ."""
    for p in params if processes() > 1 else ():
        dist.broadcast(p.data, 0)


def shard(model: nn.Module) -> nn.Module:
    """Divide the frozen base among the processes, layer by layer (FSDP2); adapters stay whole in each of them.

    Each layer's weights come together when it is computed and part again after it, so a process holds its share of the base and
    one layer. Attach the adapter first. Embeddings and output head stay whole.

    Raises:
        TrainingError: one process alone, or a model without a list of layers.
    """
    from torch.distributed.fsdp import fully_shard

    if start()[1] == 1:
        raise TrainingError("shard divides a base among several processes, and this is one: start them with torchrun or accelerate launch.")
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not stacks:
        raise TrainingError(f"{type(model).__name__} has no list of layers to divide: train it without shard.")
    for layer in max(stacks, key=lambda m: sum(p.numel() for p in m.parameters())):
        fully_shard(layer, ignored_params={p for p in layer.parameters() if p.requires_grad})
    return model
