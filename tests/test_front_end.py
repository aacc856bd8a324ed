"""What runs in the browser: committed as it is built, so that nobody needs Node, and built again here to see that it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_nb

ROOT = Path(__file__).parent.parent
WIDGETS = ROOT / "widgets"
BUILT = ("lora_nb/jupyter/static", "lora_nb/labextension")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def rebuilt(tmp_path):
    """A checkout's worth of built front end, made from the sources with the packages that are installed."""
    if not shutil.which("npm"):
        pytest.skip("needs Node: no npm on the PATH")
    if not (WIDGETS / "node_modules").is_dir():
        pytest.skip("needs the packages of the build: npm ci in widgets/")
    shutil.copytree(WIDGETS, tmp_path / "widgets", ignore=shutil.ignore_patterns("node_modules", "lib"))
    (tmp_path / "widgets/node_modules").symlink_to(WIDGETS / "node_modules")
    (tmp_path / BUILT[0]).mkdir(parents=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["npm", "run", "--silent", "build"], cwd=tmp_path / "widgets", env=environment, check=True)
    return tmp_path


@pytest.mark.slow
def test_what_is_committed_is_what_the_sources_make(rebuilt):
    for folder in BUILT:
        made, committed = files(rebuilt / folder), files(ROOT / folder)
        assert sorted(made) == sorted(committed)
        assert [name for name in made if made[name] != committed[name]] == []


def test_built_files_are_small():
    assert sum(len(content) for folder in BUILT for content in files(ROOT / folder).values()) < 100_000


def test_front_end_has_the_version_of_the_package():
    for file in (WIDGETS / "package.json", ROOT / "lora_nb/labextension/package.json"):
        assert json.loads(file.read_text())["version"] == lora_nb.__version__


def test_lock_file_names_no_registry():
    assert "resolved" not in (WIDGETS / "package-lock.json").read_text()
    assert json.loads((WIDGETS / "package-lock.json").read_text())["version"] == lora_nb.__version__
