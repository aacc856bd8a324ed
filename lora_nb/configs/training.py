"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_nb.configs.checks import checked, is_choice, is_count, is_number, require


@checked
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; names as in transformers' `TrainingArguments` where the meaning is the same.

    Args:
        max_steps: optimizer steps; None for as many as `num_train_epochs` asks, or 200 where that is None too.
        num_train_epochs: passes over the data; with `max_steps` given as well, whichever ends first.
        batch_size: blocks (texts) or pairs in one forward.
        seq_len: tokens in a block; longer pairs are cut there, and the run says how many.
        gradient_accumulation_steps: forwards in one optimizer step; the loss is the mean over all their tokens.
        learning_rate: peak rate of AdamW. LoRA wants about ten times that of full fine-tuning.
        lr_scheduler_type: `"linear"` or `"cosine"` (to zero after the warm-up) or `"constant"`.
        warmup_steps: steps over which the rate rises from zero.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: gradients are scaled down to this L2 norm; None leaves them alone.
        eval_every: steps between evaluations on `eval_dataset`; None for one at the end.
        seed: order of the data and dropout.

    Raises:
        ConfigError: an unknown field or a value that is not allowed.
    """

    max_steps: int | None = None
    num_train_epochs: float | None = None
    batch_size: int = 8
    seq_len: int = 256
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "max_steps", 200)
        require(self.max_steps is None or is_count(self.max_steps), self, "max_steps", "None or a whole number of at least 1")
        for name in ("batch_size", "gradient_accumulation_steps"):
            require(is_count(getattr(self, name)), self, name, "a whole number of at least 1")
        require(is_count(self.seq_len, 2), self, "seq_len", "a whole number of at least 2")
        require(is_count(self.warmup_steps, 0), self, "warmup_steps", "a whole number of at least 0")
        require(is_count(self.seed, 0), self, "seed", "a whole number of at least 0")
        require(self.eval_every is None or is_count(self.eval_every), self, "eval_every", "None or a whole number of at least 1")
        require(is_number(self.learning_rate) and self.learning_rate > 0, self, "learning_rate", "a number above 0")
        require(is_number(self.weight_decay) and self.weight_decay >= 0, self, "weight_decay", "a number of at least 0")
        for name in ("num_train_epochs", "max_grad_norm"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and value > 0), self, name, "None or a number above 0")
        is_choice(self.lr_scheduler_type, self, "lr_scheduler_type", ("linear", "cosine", "constant"))
