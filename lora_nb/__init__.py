"""lora_nb: parameter-efficient fine-tuning, small enough to read.

import lora_nb as ln
model, tokenizer = ln.load("tiny")
ln.attach(model, ln.LoraConfig(r=8))
ln.train(model, tokenizer, ln.dataset("tone"))
ln.save(model, "adapters/tone")
"""

from lora_nb import errors
from lora_nb.attach import AttachReport, attach, detach, disabled, parameters, set_active
from lora_nb.bases import fingerprint, load
from lora_nb.checkpoint import load_adapter, save
from lora_nb.combine import combine
from lora_nb.configs import Block, BottleneckConfig, LoraConfig, Sublayer, TrainConfig
from lora_nb.conflicts import ConflictReport, conflicts
from lora_nb.datasets import Dataset, Pair, dataset
from lora_nb.errors import LoraNbError
from lora_nb.generation import generate
from lora_nb.latency import LatencySweep, LatencyTable, measure_latency, sweep_latency
from lora_nb.loralib import load_loralib
from lora_nb.merge import MergeReport, merge, unmerge
from lora_nb.summary import AdapterSummary, inspect
from lora_nb.training.evaluation import Evaluation, evaluate
from lora_nb.training.loop import Run, Step, steps, train
from lora_nb.variants import variants
from lora_nb.version import __version__

__all__ = [
    "AdapterSummary",
    "AttachReport",
    "Block",
    "BottleneckConfig",
    "ConflictReport",
    "Dataset",
    "Evaluation",
    "LatencySweep",
    "LatencyTable",
    "LoraConfig",
    "LoraNbError",
    "MergeReport",
    "Pair",
    "Run",
    "Step",
    "Sublayer",
    "TrainConfig",
    "__version__",
    "attach",
    "combine",
    "conflicts",
    "dataset",
    "detach",
    "disabled",
    "errors",
    "evaluate",
    "fingerprint",
    "generate",
    "inspect",
    "load",
    "load_adapter",
    "load_loralib",
    "measure_latency",
    "merge",
    "parameters",
    "save",
    "set_active",
    "steps",
    "sweep_latency",
    "train",
    "unmerge",
    "variants",
]
