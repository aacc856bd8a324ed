"""Settings as frozen dataclasses, checked when made, and their translation to and from PEFT's `adapter_config.json`."""

from lora_nb.configs.lora import TASK_TYPES, LoraConfig
from lora_nb.configs.peft_json import PEFT_UNUSED, from_peft, to_peft
from lora_nb.configs.training import TrainConfig

__all__ = ["PEFT_UNUSED", "TASK_TYPES", "LoraConfig", "TrainConfig", "from_peft", "to_peft"]
