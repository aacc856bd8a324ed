"""`import lora_nb` is light: whatever is heavy is imported where it is used."""

import subprocess
import sys

import pytest

HEAVY = ("IPython", "anywidget", "bitsandbytes", "ipywidgets", "jupyterlab", "matplotlib", "peft", "transformers")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_nothing_heavy():
    assert python(f"import sys, lora_nb; print(*sorted(sys.modules.keys() & {set(HEAVY)}))") == ""


@pytest.mark.slow
def test_import_costs_little_more_than_torch():
    """A sanity check with a wide margin, not a benchmark: the best of three, taken in turn."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    rounds = [{name: float(python(code.format(name))) for name in ("torch", "lora_nb")} for _ in range(3)]
    ours, torchs = (min(times[name] for times in rounds) for name in ("lora_nb", "torch"))
    assert ours < torchs + 1.5
