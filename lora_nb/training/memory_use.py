"""What a run's memory went into, and which setting would need less of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from lora_nb.blocks import Batch
from lora_nb.configs import TrainConfig
from lora_nb.errors import OutOfMemoryError
from lora_nb.render import format_bytes
from lora_nb.training import distributed
from lora_nb.training.loss import loss_sum
from lora_nb.training.modes import checkpointing

REST = "activations and the rest"


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class for the GPU's memory and words for the CPU's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: on a GPU since `forget_peak`, else of this process ever; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":  # Python there has no `resource`
        return 0
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_by_part(model: nn.Module, optimizer: torch.optim.Optimizer, peak: int) -> dict[str, int]:
    """Bytes of a step by part: what is known from the tensors' sizes, and what remains of the peak (on a CPU the process itself, too)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device.type
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    own = sum(p.nbytes for p in trained)
    parts = {
        "frozen weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - own,
        "weights that train": own,
        "gradients": own,
        "optimizer": sum(t.nbytes for t in state if t.device.type == device),
    }
    return {**parts, REST: max(0, peak - sum(parts.values()))}


def explained(
    said: str,
    model: nn.Module,
    batch: Batch,
    config: TrainConfig,
    *,
    parts: dict[str, int],
    autocast: Callable[[], AbstractContextManager[object]],
) -> str:
    """The message after a forward that did not fit: what took the memory, and which setting would fit, found by trying."""
    places = batch.positions

    def fits(rows: int, light: bool) -> bool:
        try:
            with checkpointing(model, wanted=light):
                with autocast():
                    loss = loss_sum(model, batch.input_ids[:rows], batch.labels[:rows], None if places is None else places[:rows])
                loss.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        else:
            return True
        finally:
            _free(model)

    _free(model)
    advice = _remedy(len(batch.input_ids), config, fits) if distributed.processes() == 1 else f"lower batch_size={config.batch_size}"
    return f"{_taken(said, parts)} What to do: {advice}."


def in_words(error: BaseException, parts: dict[str, int]) -> str:
    """The message after memory was full in a step, which `explained` made, or elsewhere: in the optimizer's update, in an evaluation."""
    if isinstance(error, OutOfMemoryError):
        return str(error)
    elsewhere = "It was full in the optimizer's update or an evaluation"
    return f"{_taken(str(error), parts)} {elsewhere}: take a smaller rank, offload_optimizer=True, or evaluate on shorter rows (seq_len)."


def _taken(said: str, parts: dict[str, int]) -> str:
    taken = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"Out of memory ({(said.strip() or 'MemoryError').splitlines()[0][:200]}). It went into: {taken}."


def _free(model: nn.Module) -> None:
    """Gradients, and what PyTorch holds in reserve."""
    for p in model.parameters():
        p.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _remedy(rows: int, config: TrainConfig, fits: Callable[[int, bool], bool]) -> str:
    """Half the batch, accumulated twice as often, makes the same steps; then one row at a time, with checkpointing.

    Args:
        rows: of the forward that did not fit.
        fits: do forward and backward of so many rows go through, and with activation checkpointing?
    """
    forwards, light = config.gradient_accumulation_steps, config.gradient_checkpointing
    sizes = [rows]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    for size, more in [*((s, light) for s in sizes[1:]), *([] if light else [(1, True)])]:
        if fits(size, more):
            added = ", gradient_checkpointing=True" if more and not light else ""
            return f"batch_size={size}, gradient_accumulation_steps={forwards * -(-rows // size)}{added} fits: that was tried just now"
    return (
        f"not even one row fits with gradient_checkpointing=True: lower seq_len={config.seq_len}, load the base with quant='nf4', or take "
        "a smaller one"
    )
