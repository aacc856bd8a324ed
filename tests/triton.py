"""Triton's interpreter, which runs a kernel on a CPU. It is chosen before Triton is imported, so it has a process of its own."""

import os
import subprocess
import sys

import pytest


def interpreted(code: str) -> str:
    """What a program prints that imports our kernels; skips where Triton is not installed."""
    pytest.importorskip("triton", reason="needs Triton, which comes with torch's CUDA builds: pip install triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
