"""Lessons that work on any base: their cells with `BASE` changed to the folder of a tiny random Mistral and of a tiny random GPT-2."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

import lora_nb as ln

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
build_course = pytest.importorskip("build_course", reason="jupytext reads the sources")
LESSONS = [source for source in build_course.sources() if source.name[:2] in {"00", "02", "03", "07", "08"}]
BASE, MAGIC = re.compile(r'^BASE = "tiny"', re.MULTILINE), re.compile(r"^( *)%.*$", re.MULTILINE)
SIZES: dict[str, Any] = {"vocab_size": 6144, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["mistral", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model and the embedded base's tokenizer."""
    configs = {
        "mistral": lambda: MistralConfig(
            **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
        ),
        "gpt2": lambda: GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=512),
    }
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(configs[request.param]()).save_pretrained(folder)
    ln.load("tiny")[1].save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_runs_on_another_base(lesson: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "template")  # draws nothing, and says nothing of it
    cells = [cell.source for cell in build_course.cells(lesson, solved=False).cells if cell.cell_type == "code"]
    assert sum(len(BASE.findall(cell)) for cell in cells) == 1
    names: dict[str, Any] = {"__name__": "lesson"}
    for cell in cells:
        run(BASE.sub(f"BASE = {base!r}", MAGIC.sub(r"\1pass", cell)), names)


def run(cell: str, names: dict[str, Any]) -> None:
    """As a notebook does it: what the last line gives is shown."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "a cell", "exec"), names)  # noqa: S102 - the course's own cells
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "a cell", "eval"), names)  # noqa: S307
        assert repr(value)
        if hasattr(value, "_repr_html_"):
            value._repr_html_()
