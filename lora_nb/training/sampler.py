"""Which rows make which forward: an order that follows from the seed, so that any step can be asked for by its number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from lora_nb.blocks import IGNORE, Batch, Block, collate
from lora_nb.configs import TrainConfig


class Sampler:
    """The batches of each optimizer step, on the device that they are for; labels stay on the CPU, where they are counted.

    Nothing but the seed decides, so a run that is resumed at step n asks for step n and gets what it would have got. Several
    processes (`share` = number, of how many) divide the rows of each batch, so all of them together make the step that one makes
    alone. On a GPU the next step's batches are copied from pinned memory while the present one is computed, once `prefetch` is called.
    """

    def __init__(
        self, blocks: Sequence[Block], config: TrainConfig, pad_id: int, device: torch.device | str = "cpu", share: tuple[int, int] = (0, 1)
    ) -> None:
        self.blocks, self.config, self.pad_id, self.device, self.share = blocks, config, pad_id, torch.device(device), share
        self.forwards = math.ceil(len(blocks) / config.batch_size)  # in an epoch
        self._epoch, self._order = -1, list[int]()
        self._ready: dict[int, list[Batch]] = {}

    def step(self, number: int) -> list[Batch]:
        """The batches of optimizer step `number`, from 0."""
        self.prefetch(number)
        return self._ready.pop(number)

    def prefetch(self, number: int) -> None:
        """Have the batches of a step on their way to the device."""
        if number not in self._ready:
            k = self.config.gradient_accumulation_steps
            self._ready = {number: [self._moved(self.forward(i)) for i in range(number * k, (number + 1) * k)]}

    def forward(self, number: int) -> Batch:
        """Batch `number` of all epochs together; an epoch's last one may be smaller."""
        epoch, place = divmod(number, self.forwards)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(self.blocks, self.config, epoch)
        size = self.config.batch_size
        return self._collate(self._order[place * size : (place + 1) * size])

    def _collate(self, rows: Sequence[int]) -> Batch:
        number, count = self.share
        mine = rows[number::count]
        if mine:
            chosen = [self.blocks[j] for j in mine]
            return collate(chosen, self.pad_id, self._least(chosen))._replace(rows=tuple(mine))
        # More processes than rows: this one does its part of the work in step with the others, and learns nothing from it.
        idle = self.blocks[rows[0]]
        return collate([idle._replace(labels=[IGNORE] * len(idle.labels))], self.pad_id)

    def _least(self, rows: Sequence[Block]) -> int:
        """Compiled code is made for one length, and a minute's work: then packed rows all have the same, others one of a few."""
        if not self.config.compile:
            return 0
        longest = max(len(row.input_ids) for row in rows)
        return self.config.seq_len if self.config.packing else min(self.config.seq_len, 1 << (longest - 1).bit_length())

    def _moved(self, batch: Batch) -> Batch:
        def move(t: torch.Tensor) -> torch.Tensor:
            return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t.to(self.device)

        return batch._replace(input_ids=move(batch.input_ids), positions=None if batch.positions is None else move(batch.positions))


def order(blocks: Sequence[Block], config: TrainConfig, epoch: int) -> list[int]:
    """Shuffled; then sorted by length within windows of 16 batches, and the batches of a window shuffled again.

    Rows of like length share a batch, so that little of it is padding.
    """
    rng = random.Random(config.seed * 1_000_003 + epoch)
    shuffled = list(range(len(blocks)))
    rng.shuffle(shuffled)
    size, window, out = config.batch_size, 16 * config.batch_size, []
    for i in range(0, len(shuffled), window):
        near = sorted(shuffled[i : i + window], key=lambda j: len(blocks[j].input_ids))
        rows = [near[k : k + size] for k in range(0, len(near), size)]
        rng.shuffle(rows)
        out += [j for row in rows for j in row]
    return out


def total_steps(blocks: int, config: TrainConfig) -> int:
    """Optimizer steps of the run."""
    if config.num_train_epochs is None:
        return config.max_steps or 1
    forwards = math.ceil(blocks / config.batch_size) * config.num_train_epochs
    wanted = max(1, math.ceil(forwards / config.gradient_accumulation_steps))
    return min(wanted, config.max_steps or wanted)
