"""Where the adapters of a server are: on disk, in host memory, or in a device slot, where they act.

    disk → host     in the background, by a thread of its own: read, checked against the base, made into parts
    host → slot     between two steps; the least recently used adapter that no text under way needs makes room
    slot → host     the same way back; what host memory has no room for is forgotten, as the disk has it

(S-LoRA, arXiv:2311.03285, and LoRAX call this a tiered cache.) On a CPU host and device are the same memory, and a slot is
only the right to act.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_nb.adapter_files import CONFIG, read_folder
from lora_nb.attach import adapters, freeze, layers, release
from lora_nb.attach_report import AttachReport, report_of
from lora_nb.checkpoint import fill_part, fit_file
from lora_nb.errors import AdapterError, AdapterFileError, LoraNbError, nearest
from lora_nb.layers.adapted import AdaptedLayer, Part, adapted
from lora_nb.layers.mixed import forget
from lora_nb.thread_pool import give_back

AHEAD = 2  # adapters that are loaded ahead of their turn
NAME = re.compile(r"[A-Za-z0-9][\w\- ]{0,199}")  # no dot, no slash: it is also the name of a folder


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory: what it does at each module, and the state of its file when it was read."""

    parts: dict[str, Part]
    report: AttachReport
    bytes: int
    stamp: object


class Tiers:
    """The adapters of one model, by name.

    Args:
        device_slots: how many may act.
        host_slots: how many more are kept in memory.
        folder: adapters are its subfolders, by their names; None: only those that are `add`ed or attached already.
        wake: called when something was loaded.

    One thread alone, which runs the model, calls everything but `check`, `names`, `add` and `remove`. Adapters that the model
    carries already stay where they are and have no slot.
    """

    def __init__(
        self, model: nn.Module, device_slots: int, host_slots: int, folder: Path | None, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.device_slots, self.host_slots, self.wake = model, device_slots, host_slots, wake
        self.folder = None if folder is None else folder.resolve()
        self.device = next(model.parameters()).device
        self.residents = frozenset(adapters(model).reports)
        self.layers: dict[str, AdaptedLayer] = dict(layers(model))
        self.loads: dict[str, int] = {}
        self.slots: OrderedDict[str, Loaded] = OrderedDict()
        self.host: OrderedDict[str, Loaded] = OrderedDict()
        self.errors: dict[str, LoraNbError] = {}
        self._given: dict[str, Path] = {}
        self._loading: set[str] = set()
        self._asked: set[str] = set()
        self._wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[str, Loaded | LoraNbError]] = queue.SimpleQueue()
        self._surgery = threading.Lock()  # held by whoever reads or changes which modules the model has
        freeze(model, adapters(model))
        self._thread = threading.Thread(target=self._load_all, name="lora_nb loader", daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """All there are, on disk and in memory."""
        found: set[str] = {*self.residents, *self._given}
        if self.folder is not None and self.folder.is_dir():
            found |= {p.name for p in self.folder.iterdir() if NAME.fullmatch(p.name) and (p / CONFIG).is_file()}
        return sorted(found)

    def add(self, name: str, path: Path) -> None:
        """Let the adapter in a folder of its own be asked for by a name."""
        if not NAME.fullmatch(name) or name in self.residents:
            taken = (
                "is carried by the model already" if name in self.residents else "cannot name an adapter: letters, digits, '-', '_', ' '"
            )
            raise AdapterError(f"{name!r} {taken}. Choose another name.")
        if not (path / CONFIG).is_file():
            raise AdapterFileError(f"{str(path)!r} has no {CONFIG}: an adapter is a folder with its config and its weights.")
        self._given[name] = path.resolve()

    def remove(self, name: str) -> None:
        """Forget a name that was added."""
        if self._given.pop(name, None) is None:
            raise AdapterError(f"No adapter {name!r} was added." + nearest(name, self._given))

    def check(self, name: str) -> None:
        """Raise AdapterError unless there is an adapter of that name."""
        if name not in self.residents:
            self._path(name)

    def _path(self, name: str) -> Path:
        """Its folder, which lies in the one that was given, whatever the name says and links do."""
        path = self._given.get(name)
        if path is None and self.folder is not None and NAME.fullmatch(name):
            inside = (self.folder / name).resolve()
            path = inside if inside.parent == self.folder else None
        if path is None or not (path / CONFIG).is_file():
            raise AdapterError(f"There is no adapter {name[:80]!r}." + nearest(name[:80], self.names()))
        return path

    def ready(self, name: str | None) -> bool:
        """Whether it can act now."""
        if name is None or name in self.residents:
            return True
        if name in self.slots:
            self.slots.move_to_end(name)
        return name in self.slots

    def wanted(self, name: str) -> bool:
        """Have it brought to host memory, unless it is there: True if it is.

        Raises:
            LoraNbError: it was tried and cannot be read.
        """
        self._collect()
        if name in self.errors:
            raise self.errors.pop(name)
        self._asked.add(name)
        if name not in self.host and name not in self._loading and len(self._loading) < AHEAD:
            self._loading.add(name)
            self._wanted.put(name)
        return name in self.host

    def forget_errors(self, wanted: Collection[str | None]) -> None:
        """Those of adapters that nobody waits for any more: who asks next has it tried again."""
        self.errors = {name: error for name, error in self.errors.items() if name in wanted}

    def refresh(self, name: str, in_use: Collection[str]) -> None:
        """Forget what memory has of it if its files have changed or gone; a text under way keeps what it began with."""
        loaded = self.slots.get(name) or self.host.get(name)
        if loaded is None or name in in_use:
            return
        try:
            same = loaded.stamp == _stamp(self._path(name))
        except LoraNbError:
            same = False
        if same or not self._surgery.acquire(blocking=False):
            return
        try:
            if name in self.slots:
                self._take_off(name)
            self.host.pop(name, None)
        finally:
            self._surgery.release()

    def place(self, name: str, in_use: Collection[str]) -> bool:
        """Give an adapter of the host's a slot, if one is free or can be freed now."""
        free = [n for n in self.slots if n not in in_use]
        full = len(self.slots) >= self.device_slots
        if (full and not free) or not self._surgery.acquire(blocking=False):  # the loader looks at the model: in the next step, then
            return False
        try:
            loaded = self.host.pop(name)
            if full:
                self._take_off(free[0])
            for path, part in loaded.parts.items():
                self._layer(path).adapters[name] = part if self.device.type == "cpu" else part.to(self.device)
            adapters(self.model).reports[name] = loaded.report
            self.slots[name] = loaded
            self._asked.discard(name)
        finally:
            self._surgery.release()
        return True

    def _layer(self, path: str) -> AdaptedLayer:
        if path not in self.layers:
            self.layers[path] = adapted(self.model.get_submodule(path))
            self.model.set_submodule(path, self.layers[path])
        return self.layers[path]

    def _take_off(self, name: str) -> None:
        """From its slot to host memory."""
        loaded = self.slots.pop(name)
        for path, part in loaded.parts.items():
            del self.layers[path].adapters[name]
            forget(part)
            if self.device.type != "cpu":
                part.to("cpu")
        adapters(self.model).reports.pop(name, None)
        self._keep(name, loaded)

    def _keep(self, name: str, loaded: Loaded) -> None:
        """In host memory; where that is full the one used longest ago is forgotten, first of those that nobody waits for."""
        self.host[name] = loaded
        while len(self.host) > max(1, self.host_slots):  # one is on its way to a slot
            del self.host[next((n for n in self.host if n not in self._asked), next(iter(self.host)))]

    def _collect(self) -> None:
        """What the loader has finished."""
        while not self._done.empty():
            name, result = self._done.get()
            self._loading.discard(name)
            if isinstance(result, Loaded):
                self.loads[name] = self.loads.get(name, 0) + 1
                self._keep(name, result)
            else:
                self.errors[name] = result

    def _load_all(self) -> None:
        while (name := self._wanted.get()) is not None:
            try:
                self._done.put((name, self._load(name)))
            except LoraNbError as error:
                self._done.put((name, error))
            except Exception as error:  # noqa: BLE001 - a file may break a reader in ways of its own; the thread goes on
                self._done.put((name, AdapterFileError(f"The adapter {name!r} cannot be read: {type(error).__name__}: {error}.")))
            give_back()  # else they would slow the server's
            self.wake()

    @torch.no_grad()
    def _load(self, name: str) -> Loaded:
        path = self._path(name)
        stamp, saved = _stamp(path), read_folder(path)
        with self._surgery:
            fit = fit_file(self.model, path, saved)
            if fit.problems:
                raise AdapterFileError(f"{name!r}: {' '.join(fit.problems)}")
            parts: dict[str, Part] = {}
            for target in fit.targets:
                part = parts[target.name] = target.make().eval().requires_grad_(requires_grad=False)
                if target.shares is not None:
                    _share(parts[target.shares], part)
                if not fill_part(part, fit.starts.get(target.name, ""), fit.tensors):
                    raise AdapterFileError(f"{name!r} lacks tensors of {target.name!r}. Save it again.")
            report = report_of(self.model, name, fit.config, fit.targets)
        size = sum(t.numel() * t.element_size() for part in parts.values() for t in part.parameters())
        return Loaded(parts, report, size, stamp)

    def close(self) -> None:
        """Stop loading and leave the model as it was."""
        self._wanted.put(None)
        self._thread.join()
        for name in list(self.slots):  # the loader has ended: nobody else looks at the model
            self._take_off(name)
        self.host.clear()
        for path, layer in self.layers.items():
            if not layer.adapters:
                self.model.set_submodule(path, layer.base)
        state = adapters(self.model)
        if not state.reports:
            release(self.model, state)
            if state.merged is None:
                del self.model.lora_nb_adapters


def _share(owner: Part, part: Part) -> None:
    """A tied layer's part has the parameters of the one that owns them."""
    for key, p in owner.named_parameters():
        place, _, leaf = key.rpartition(".")
        part.get_submodule(place)._parameters[leaf] = p


def _stamp(path: Path) -> object:
    """Changes when the files do."""
    return tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(path.iterdir()) if p.is_file())
