"""Settings as frozen dataclasses, checked when made, and their translation to and from PEFT's and AdapterHub's `adapter_config.json`."""

from lora_nb.configs.adapterhub_json import from_adapterhub, from_blocks, from_interface, to_adapterhub, to_blocks
from lora_nb.configs.bottleneck import Block, BottleneckConfig, Sublayer
from lora_nb.configs.lora import TASK_TYPES, LoraConfig
from lora_nb.configs.peft_json import PEFT_UNUSED, from_peft, to_peft
from lora_nb.configs.quant import QuantConfig
from lora_nb.configs.training import TrainConfig

__all__ = [
    "PEFT_UNUSED",
    "TASK_TYPES",
    "Block",
    "BottleneckConfig",
    "LoraConfig",
    "QuantConfig",
    "Sublayer",
    "TrainConfig",
    "from_adapterhub",
    "from_blocks",
    "from_interface",
    "from_peft",
    "to_adapterhub",
    "to_blocks",
    "to_peft",
]
