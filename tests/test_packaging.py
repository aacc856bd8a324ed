"""What ships: built as for a release, without a network, and looked into."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_nb

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MB = 1_000_000


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The sdist, and the wheel made from that sdist: what the sdist lacks, the wheel lacks too."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True)
    return out


@pytest.fixture(scope="module")
def wheel(dist):
    """Name → content of each file in the wheel."""
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(dist):
    """Name → content of each file in the sdist, without the folder that holds them all."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        return {m.name.split("/", 1)[1]: archive.extractfile(m).read() for m in archive if m.isfile()}


def metadata(wheel, file):
    return wheel[f"lora_nb-{lora_nb.__version__}.dist-info/{file}"].decode()


def tracked(*folders):
    """The files of these folders that git knows, or would know."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout to compare with")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


@pytest.mark.slow
def test_wheel_has_the_whole_package_and_the_course(wheel):
    expected = tracked("lora_nb") | {f"lora_nb/{name}" for name in tracked("notebooks") if name.endswith(".ipynb")}
    assert {name for name in wheel if ".dist-info/" not in name and ".data/" not in name} == expected
    assert expected >= {"lora_nb/py.typed", "lora_nb/tiny/model.safetensors", "lora_nb/notebooks/00_start.ipynb"}
    assert any(name.startswith("lora_nb/data/") for name in expected)


@pytest.mark.slow
def test_wheel_puts_the_extension_where_jupyterlab_looks(wheel):
    place = f"lora_nb-{lora_nb.__version__}.data/data/share/jupyter/labextensions/lora-nb/"
    there = {name.removeprefix(place): content for name, content in wheel.items() if name.startswith(place)}
    built = {name.removeprefix("lora_nb/labextension/"): (ROOT / name).read_bytes() for name in tracked("lora_nb/labextension")}
    assert there == built | {"install.json": (ROOT / "widgets/install.json").read_bytes()}
    assert [name for name in wheel if ".data/" in name and not name.startswith(place)] == []
    assert "build_log.json" not in there


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment with all that this one has except lora_nb: a folder of links to its packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    (borrowed := folder / "borrowed").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lora_nb" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (inside / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder


def ran(*words):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment, cwd="/")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkout", "wheel", "sdist"])
def test_extension_is_enabled_after_pip_and_gone_after_it(bare, dist, what):
    source = {"checkout": ROOT, "wheel": next(dist.glob("*.whl")), "sdist": next(dist.glob("*.tar.gz"))}[what]
    python, pip = bare / "bin/python", (sys.executable, "-m", "pip", "--python", bare / "bin/python")

    def there():
        files = (str(p.relative_to(bare)) for p in bare.rglob("*") if "borrowed" not in p.parts)
        return {name for name in files if "__pycache__" not in name}

    before = there()
    ran(*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", source)
    listed = ran(python, "-m", "jupyterlab.labextensions", "list")
    line = next(line for line in re.sub(r"\x1b\[\d+m", "", listed.stdout + listed.stderr).splitlines() if "lora-nb v" in line)
    assert line.split() == ["lora-nb", f"v{lora_nb.__version__}", "enabled", "OK", "(python,", "lora_nb)"]
    ran(*pip, "uninstall", "--yes", "lora-nb")
    left = there() - before
    assert {name for name in left if "lora" in name} == set()


@pytest.mark.slow
def test_embedded_model_stays_small(wheel):
    assert len(wheel["lora_nb/tiny/model.safetensors"]) <= 16 * MB


@pytest.mark.slow
def test_sdist_has_what_a_maintainer_needs(sdist):
    assert sdist.keys() >= tracked("lora_nb", "notebooks", "tests", "benchmarks", "tools", "widgets", "binder")
    assert sdist.keys() >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_nothing_ships_that_belongs_to_a_build_or_a_machine(archive, request):
    files = request.getfixturevalue(archive)
    # Source maps; and text of some length, such as what the embedded base was trained on.
    assert [name for name, content in files.items() if name.endswith(".map") or (name.endswith(".txt") and len(content) > MB / 10)] == []
    # A path, not the tail of one: "/repo" is not found in "owner/repo".
    here = re.compile(rb"(?<![\w./-])(%s)(?![\w-])" % b"|".join(re.escape(str(p).encode()) for p in {ROOT, Path.home(), Path(sys.prefix)}))
    assert [name for name, content in files.items() if here.search(content)] == []


@pytest.mark.slow
def test_wheel_has_no_tests(wheel):
    assert [name for name in wheel if "tests" in PurePosixPath(name).parts] == []


@pytest.mark.slow
def test_licence_is_stated_and_enclosed(wheel):
    headers = HeaderParser().parsestr(metadata(wheel, "METADATA"))
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers.get_all("License-File") == ["LICENSE"]
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_command_is_installed(wheel):
    assert "lora-nb = lora_nb.cli:main" in metadata(wheel, "entry_points.txt")


def test_package_knows_its_version():
    assert importlib.metadata.version("lora-nb") == lora_nb.__version__


def test_tested_versions_are_versions_that_the_package_allows():
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        need = Requirement(line)
        assert pins[canonicalize_name(need.name)] in need.specifier
