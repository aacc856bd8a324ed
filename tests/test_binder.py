"""What Binder reads fits the project; `tools/prove_binder.sh` runs it."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
BINDER = ROOT / "binder"


def torch_version(file: Path) -> Version:
    return Version(re.search(r"^torch==(\S+)$", file.read_text(), re.MULTILINE)[1])


def test_python_is_pinned_to_one_that_the_package_supports():
    pinned = re.fullmatch(r"python-(3\.\d+)\n", (BINDER / "runtime.txt").read_text())[1]
    assert pinned in SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])


def test_torch_is_a_cpu_build_of_the_tested_version():
    torch = torch_version(BINDER / "requirements.txt")
    assert torch.local == "cpu"
    assert torch.public == str(torch_version(ROOT / "constraints.txt"))


def test_post_build_is_bash_that_stops_at_the_first_error():
    script = BINDER / "postBuild"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -e" in lines
    assert script.stat().st_mode & 0o100
