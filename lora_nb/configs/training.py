"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_nb.configs.checks import checked, is_choice, is_count, is_number, require

CHOICES = {
    "lr_scheduler_type": ("linear", "cosine", "constant"),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
    "precision": ("fp32", "bf16", "fp16"),
}
SWITCHES = ("packing", "offload_optimizer", "gradient_checkpointing", "compile", "resume")
PLACES = ("checkpoint_dir", "log_file", "tensorboard_dir")


@checked
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; names as in transformers' `TrainingArguments` where the meaning is the same.

    Args:
        max_steps: optimizer steps; None for as many as `num_train_epochs` asks, or 200 where that is None too.
        num_train_epochs: passes over the data; with `max_steps` given as well, whichever ends first.
        batch_size: blocks (texts), pairs or, with `packing`, packed rows in one forward; several processes share them.
        seq_len: tokens in a block; longer pairs are cut there, and the run says how many.
        packing: several short pairs in one row of `seq_len`, none of which sees another: less padding, fewer forwards.
        gradient_accumulation_steps: forwards in one optimizer step; the loss is the mean over all their tokens.
        learning_rate: peak rate of AdamW. LoRA wants about ten times that of full fine-tuning.
        lr_scheduler_type: `"linear"` or `"cosine"` (to zero after the warm-up) or `"constant"`.
        warmup_steps: steps over which the rate rises from zero.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: gradients are scaled down to this L2 norm; None leaves them alone.
        optimizer: `"adamw"`, or of bitsandbytes on a CUDA GPU `"adamw_8bit"` (a quarter of the state), `"paged_adamw"`,
            `"paged_adamw_8bit"` (state that moves to the CPU's memory when the GPU's is full).
        loraplus_lr_ratio: LoRA+ (Hayou et al., 2024, arXiv:2402.12354): B's rate over A's; 16 is the paper's. None: one rate for all.
        offload_optimizer: AdamW's state in the CPU's memory, where the update is computed too: slower, 8 bytes a parameter less.
        precision: `"bf16"` or `"fp16"` computes products in 16 bits (autocast; fp16 with a scaled loss), `"fp32"` leaves the types of
            the weights alone. None: bf16 on GPUs that have it, fp16 on those that do not, fp32 elsewhere.
        gradient_checkpointing: keep only each layer's input and compute the layer again on the way back: a third more time for a
            fraction of the memory, and the same gradients.
        compile: forward and loss through `torch.compile`: minutes at the start, faster steps after.
        eval_every: steps between evaluations on `eval_dataset`; None for one at the end.
        early_stopping_patience: so many evaluations without a new lowest loss end the run; it needs `eval_every`.
        checkpoint_dir: folder that the run can be resumed from after a crash; the newest two checkpoints stay.
        checkpoint_every: steps between checkpoints, 100 unless given; the end of a run makes one, too.
        resume: go on from the newest whole checkpoint in `checkpoint_dir`, or start where there is none yet.
        log_file: JSON Lines, one a step and one an evaluation, written while the run goes on; replaced unless the run is resumed.
            None: `log.jsonl` in `checkpoint_dir`, if there is one.
        tensorboard_dir: folder for TensorBoard's events; needs the package tensorboard.
        seed: order of the data and dropout.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    max_steps: int | None = None
    num_train_epochs: float | None = None
    batch_size: int = 8
    seq_len: int = 256
    packing: bool = False
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    loraplus_lr_ratio: float | None = None
    offload_optimizer: bool = False
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    eval_every: int | None = None
    early_stopping_patience: int | None = None
    checkpoint_dir: str | Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    log_file: str | Path | None = None
    tensorboard_dir: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "max_steps", 200)
        self._check_numbers()
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if name != "precision" or value is not None:
                is_choice(value, self, name, choices)
        for name in SWITCHES:
            require(isinstance(getattr(self, name), bool), self, name, "True or False")
        for name in PLACES:
            value = getattr(self, name)
            require(value is None or (isinstance(value, str | Path) and str(value) != ""), self, name, "None or a path")
        self._check_together()

    def _check_numbers(self) -> None:
        for name, least in {"batch_size": 1, "gradient_accumulation_steps": 1, "seq_len": 2, "warmup_steps": 0, "seed": 0}.items():
            require(is_count(getattr(self, name), least), self, name, f"a whole number of at least {least}")
        for name in ("max_steps", "eval_every", "early_stopping_patience", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or is_count(value), self, name, "None or a whole number of at least 1")
        require(is_number(self.learning_rate) and self.learning_rate > 0, self, "learning_rate", "a number above 0")
        require(is_number(self.weight_decay) and self.weight_decay >= 0, self, "weight_decay", "a number of at least 0")
        for name in ("num_train_epochs", "max_grad_norm", "loraplus_lr_ratio"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and value > 0), self, name, "None or a number above 0")

    def _check_together(self) -> None:
        """Settings that mean something only beside others."""
        patient, placed = self.early_stopping_patience is not None, self.checkpoint_dir is not None
        require(self.eval_every is not None or not patient, self, "early_stopping_patience", "None unless eval_every is given")
        require(placed or self.checkpoint_every is None, self, "checkpoint_every", "None unless checkpoint_dir is given")
        require(placed or not self.resume, self, "resume", "False unless checkpoint_dir is given")
        bits = self.offload_optimizer and self.optimizer != "adamw"
        require(not bits, self, "offload_optimizer", "False unless optimizer is 'adamw': the paged ones move their state by themselves")
