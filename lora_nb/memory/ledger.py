"""Every storage that a piece of code makes, when it appears and when it goes, for tensors without values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VALUE = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 - what `.item()` and `bool()` call


class Blank(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, code that asks a tensor without content for a value hears 0, or False."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is VALUE and _is_blank(args[0]):
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def _is_blank(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


@dataclass
class Entry:
    """One storage: bytes, the module that was running, the phase of the step, whether a forward was on, and what it is."""

    bytes: int
    module: str
    phase: str
    forward: bool
    width: int
    part: str = ""


class Ledger(Blank):  # type: ignore[no-untyped-call]
    """While it is entered, notes each new storage and its end; `phase` is set from outside, modules are followed by hooks on all.

    The hooks are global, as a module's own would change which path its layer takes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(m): name for name, m in model.named_modules()}
        self.weights = {p.shape for p in model.parameters() if p.requires_grad and p.ndim > 1}
        self.entries: list[Entry] = []
        self.events: list[tuple[int, int]] = []  # index of the entry, bytes more or fewer
        self.phase, self.stack = "start", list[str]()
        self._there: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and self._joins_gradients(args):
            out = args[0].add_(args[1])
        else:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out

    def _joins_gradients(self, args: Any) -> bool:
        """Autograd adds two gradients of a tied weight in the memory of the first, but not of tensors of another class, as these are."""
        joined = self.phase == "backward" and not self.stack and all(isinstance(a, Tensor) for a in args)
        return joined and args[0].shape == args[1].shape and args[0].shape in self.weights

    def note(self, tensor: Tensor, part: str = "") -> None:
        """Put a tensor's storage down, unless it is there."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - there is no public name for which storage it is
        if key in self._there:
            return
        index, count = len(self.entries), storage.nbytes()
        width = int(tensor.shape[-1]) if tensor.ndim else 1
        module = self.stack[-1] if self.stack else ""
        self.entries.append(Entry(count, module, self.phase, bool(self.stack), width, part))
        self.events.append((index, count))
        self._there[key] = (weakref.ref(storage, lambda _gone: self._end(key, index, count)), index)

    def _end(self, key: int, index: int, count: int) -> None:
        self._there.pop(key, None)
        self.events.append((index, -count))

    def find(self, tensor: Tensor) -> Entry | None:
        """What was noted of a tensor's storage."""
        found = self._there.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
        return self.entries[found[1]] if found else None

    def call(self, tensor: Tensor, part: str) -> None:
        """Say what a tensor is."""
        entry = self.find(tensor)
        if entry is not None:
            entry.part = part

    def alive(self) -> list[Entry]:
        """What is there now."""
        return [self.entries[index] for _, index in self._there.values()]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep `stack` at the modules whose forward runs."""

        def enter(module: nn.Module, _inputs: object) -> None:
            self.stack.append(self.names.get(id(module), type(module).__name__))

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            self.stack.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def course(self, start: int) -> list[tuple[str, dict[str, int]]]:
        """(phase, bytes by part) after each event from `start` on."""
        now: dict[str, int] = {}
        out: list[tuple[str, dict[str, int]]] = []
        phase = "start"
        for at, (index, count) in enumerate(self.events):
            entry = self.entries[index]
            now[entry.part] = now.get(entry.part, 0) + count
            phase = entry.phase if count > 0 else phase
            if at >= start:
                out.append((phase, {part: total for part, total in now.items() if total}))
        return out

    def modules_at(self, event: int) -> dict[str, int]:
        """Bytes by module of what is there after that event and is no weight."""
        there: dict[int, int] = {}
        for index, count in self.events[: event + 1]:
            there[index] = there.get(index, 0) + count
        found: dict[str, int] = {}
        for index, count in there.items():
            if count and self.entries[index].part not in {"weights", "adapters", "optimizer"}:
                name = self.entries[index].module or self.entries[index].phase
                found[name] = found.get(name, 0) + count
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def without_values(model: nn.Module, make: Any) -> nn.Module:
    """A copy whose parameters and buffers are what `make` makes of each; tied ones stay tied, and the model itself is left alone."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            made = make(tensor)
            memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    kept = list(memo.values())  # deepcopy lets go of what it has only seen once
    copied = copy.deepcopy(model, memo)
    del kept
    return copied


def on_meta(tensor: Tensor) -> Tensor:
    """The same without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
