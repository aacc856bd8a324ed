"""lora_nb: parameter-efficient fine-tuning, small enough to read.

import lora_nb as ln
model, tokenizer = ln.load("tiny")
ln.attach(model, ln.LoraConfig(r=8))
ln.train(model, tokenizer, ln.dataset("tone"))
ln.save(model, "adapters/tone")
"""

from typing import TYPE_CHECKING

from lora_nb import errors
from lora_nb.attach import attach, detach, disabled, parameters, set_active
from lora_nb.attach_report import AttachReport
from lora_nb.bases import load
from lora_nb.checkpoint import load_adapter, save
from lora_nb.checks import check
from lora_nb.combine import combine
from lora_nb.configs import Block, BottleneckConfig, LoraConfig, QuantConfig, Sublayer, TrainConfig
from lora_nb.conflicts import ConflictReport, conflicts
from lora_nb.datasets import Dataset, Pair, dataset
from lora_nb.engines import save_for_engines
from lora_nb.errors import LoraNbError
from lora_nb.generation import generate
from lora_nb.latency import LatencySweep, LatencyTable, measure_latency, sweep_latency
from lora_nb.loralib import load_loralib
from lora_nb.memory.estimate import estimate
from lora_nb.memory.report import Estimate
from lora_nb.memory.trace import trace_memory
from lora_nb.merge import MergeReport, merge, unmerge
from lora_nb.origin import fingerprint
from lora_nb.quantization import QuantReport, quantize
from lora_nb.rank import RankReport, find_rank, shrink
from lora_nb.routing import rows
from lora_nb.serving import AdapterServer
from lora_nb.showing import Source, show
from lora_nb.storage import StorageTable, storage, store
from lora_nb.summary import AdapterSummary, inspect
from lora_nb.training.evaluation import Evaluation, evaluate
from lora_nb.training.loop import Run, Step, steps, train
from lora_nb.variants import variants
from lora_nb.version import __version__

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lora_nb.jupyter.panel import Panel

__all__ = [
    "AdapterServer",
    "AdapterSummary",
    "AttachReport",
    "Block",
    "BottleneckConfig",
    "ConflictReport",
    "Dataset",
    "Estimate",
    "Evaluation",
    "LatencySweep",
    "LatencyTable",
    "LoraConfig",
    "LoraNbError",
    "MergeReport",
    "Pair",
    "QuantConfig",
    "QuantReport",
    "RankReport",
    "Run",
    "Source",
    "Step",
    "StorageTable",
    "Sublayer",
    "TrainConfig",
    "__version__",
    "attach",
    "check",
    "combine",
    "conflicts",
    "dataset",
    "detach",
    "disabled",
    "errors",
    "estimate",
    "evaluate",
    "find_rank",
    "fingerprint",
    "generate",
    "inspect",
    "load",
    "load_adapter",
    "load_loralib",
    "measure_latency",
    "merge",
    "panel",
    "parameters",
    "quantize",
    "rows",
    "save",
    "save_for_engines",
    "set_active",
    "show",
    "shrink",
    "steps",
    "storage",
    "store",
    "sweep_latency",
    "trace_memory",
    "train",
    "unmerge",
    "variants",
]


def panel(model: "nn.Module | None" = None, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Panel":
    """The control panel: choose, see what it costs, train, stop, resume, save, and read the code that does the same.

    Args:
        model, tokenizer: your own; default: the base that the form names, the embedded one at first.
    """
    from lora_nb.jupyter.panel import Panel

    return Panel(model=model, tokenizer=tokenizer)


def load_ipython_extension(shell: "InteractiveShell") -> None:
    """`%load_ext lora_nb`: adds `%lora` and what Tab offers after it."""
    from lora_nb.jupyter.magics import LoraMagics, matcher

    magics = LoraMagics(shell)
    shell.register_magics(magics)
    unload_ipython_extension(shell)
    shell.Completer.custom_matchers.append(matcher(magics))


def unload_ipython_extension(shell: "InteractiveShell") -> None:
    """`%unload_ext lora_nb`: takes the completion off again."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != "lora_nb.matcher"]
