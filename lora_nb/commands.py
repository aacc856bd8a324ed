"""The verbs: one function each, whose signature is the one definition of its options for every door that leads to it.

A parameter without default is positional; the others are options. `Annotated[type, "help"]` carries the help.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
from pathlib import Path
from typing import Annotated

from lora_nb.attach import attach
from lora_nb.bases import load
from lora_nb.checkpoint import load_adapter, save
from lora_nb.configs import LoraConfig, TrainConfig
from lora_nb.datasets import dataset, prompt_of
from lora_nb.errors import LoraNbError
from lora_nb.generation import generate as generate_text
from lora_nb.render import text_table
from lora_nb.summary import AdapterSummary
from lora_nb.summary import inspect as inspect_adapter
from lora_nb.training.evaluation import evaluate
from lora_nb.training.loop import Run
from lora_nb.training.loop import train as train_model

COURSE = Path(__file__).parent / "notebooks"  # in a wheel
CHECKOUT = Path(__file__).parent.parent / "notebooks"  # in a checkout


def train(
    data: Annotated[str, "tone, topics, stdlib, planted, a .txt .csv .tsv or .jsonl file, or a Hub data set"],
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id"] = "tiny",
    out: Annotated[str, "folder to save the adapter in; default: adapters/NAME-OF-THE-DATA"] = "",
    r: Annotated[int, "rank"] = 16,
    lora_alpha: Annotated[float, "scale is alpha / r"] = 32,
    target_modules: Annotated[str, "all-linear, or names divided by commas"] = "all-linear",
    max_steps: Annotated[int, "optimizer steps"] = 300,
    batch_size: Annotated[int, "texts or pairs in a step"] = 16,
    seq_len: Annotated[int, "tokens in a block"] = 256,
    learning_rate: Annotated[float, "peak learning rate; the embedded base takes this one, large models a tenth and less"] = 5e-3,
    seed: Annotated[int, "order of the data, start of A"] = 0,
) -> Run:
    """Fine-tune a base with LoRA, say what it gained on held-out data, and save the adapter."""
    import torch

    lora = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=_names(target_modules))
    config = TrainConfig(max_steps=max_steps, batch_size=batch_size, seq_len=seq_len, learning_rate=learning_rate, seed=seed)
    folder = Path(out or f"adapters/{Path(data).stem}")
    examples, held = dataset(data, "train"), dataset(data, "test")
    model, tokenizer = load(base)
    torch.manual_seed(seed)
    print(attach(model, lora))
    run = train_model(model, tokenizer, examples, config, eval_dataset=held[:200])
    print(run)
    print(evaluate(model, tokenizer, held[:200], seq_len=seq_len))
    print(f"saved in {save(model, folder)}")
    return run


def generate(
    prompts: Annotated[list[str], "what to continue; several are answered in one batch"],
    *,
    base: Annotated[str, "tiny, a folder, or a Hub id"] = "tiny",
    adapter: Annotated[str, "folder of a saved adapter; its answers stand beside the base's"] = "",
    pair: Annotated[bool, "write each prompt as in training on pairs: 'prompt =>'"] = False,
    max_new_tokens: Annotated[int, "most tokens to write"] = 60,
    temperature: Annotated[float, "0: always the likeliest token"] = 0.0,
    seed: Annotated[int, "of the drawing"] = 0,
) -> list[str]:
    """Let a base write, and beside it the same base with an adapter."""
    model, tokenizer = load(base)
    written = [prompt_of(p) if pair else p for p in prompts]
    answers = {"base": generate_text(model, tokenizer, written, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)}
    if adapter:
        load_adapter(model, adapter)
        answers[adapter] = generate_text(model, tokenizer, written, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    for i, prompt in enumerate(prompts):
        print(text_table([prompt, ""], [(who, " ".join(texts[i].split())) for who, texts in answers.items()]), end="\n\n")
    return list(answers[adapter or "base"])


def inspect(path: Annotated[str, "folder of a saved adapter"]) -> AdapterSummary:
    """Say what a saved adapter is, without loading a model."""
    summary = inspect_adapter(path)
    print(summary)
    return summary


def lab(
    *,
    folder: Annotated[str, "folder with the notebooks; default: the course"] = "",
    port: Annotated[int, "0: the first free one from 8888 up"] = 0,
    no_browser: Annotated[bool, "only print the address"] = False,
    jupyter: Annotated[str, "further arguments for JupyterLab, in one string"] = "",
) -> None:
    """Open the course in JupyterLab, on its first notebook."""
    course = Path(folder) if folder else _course()
    port = port or _free_port()
    token = os.environ.setdefault("JUPYTER_TOKEN", secrets.token_hex(16))
    headless = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    command = [sys.executable, "-m", "jupyterlab", str(course / "00_start.ipynb"), f"--port={port}", "--port-retries=0"]
    command += ["--log-level=WARN", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--no-browser"] if no_browser or headless else []
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    print(f"The course opens at  http://localhost:{port}/lab/tree/00_start.ipynb?token={token}\nStop it with Ctrl-C.", flush=True)
    os.execv(sys.executable, [*command, *jupyter.split()])  # noqa: S606 - no shell is wanted


VERBS = (lab, train, generate, inspect)


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]


def _course() -> Path:
    """The notebooks of the checkout; from a wheel, a copy in the current folder, so that what is installed stays whole."""
    if (CHECKOUT / "00_start.ipynb").is_file():
        return CHECKOUT
    mine = Path.cwd() / "lora_nb_course"
    if not mine.exists():
        if not COURSE.is_dir():
            raise LoraNbError("This installation has no notebooks: install lora-nb from its wheel or run it from a checkout.")
        shutil.copytree(COURSE, mine)
    return mine


def _free_port() -> int:
    for port in range(8888, 8988):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise LoraNbError("No port between 8888 and 8987 is free: choose one with --port.")


__all__ = ["VERBS", "generate", "inspect", "lab", "train"]
