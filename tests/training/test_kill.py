"""The benchmark that kills runs, in small: three kills, two full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parents[2] / "benchmarks" / "kill.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    words = [sys.executable, str(KILL), "--kills", "3", "--disk-full", "2", "--seed", "1", "--out", str(tmp_path / "kill.json")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "kill.json").read_text())
    assert (found["kill"]["same"], found["disk_full"]["whole"]) == (3, 2)
    assert all(trial["died"] for trial in found["kill"]["trials"])
