"""A page in a real browser that keeps what it logs and what it asks for, and fails the test on an error or a far request."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
# A Python that has jupyter-collaboration beside lora_nb: then all tests here run with it. CONTRIBUTING.md says how.
COLLABORATION = os.environ.get("LORA_NB_COLLABORATION") or (sys.executable if find_spec("jupyter_collaboration") else None)
AXE = ROOT / "widgets/node_modules/axe-core/axe.min.js"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
BASE = "/user/someone/"  # as behind JupyterHub; `lora-nb lab`, which test_lab.py starts, serves at the root
# No other errors are let pass. When a kernel is restarted just after its start, JupyterLab's own debugger says so, and what was under
# way for the comm that ipywidgets has just opened: its subshell, its answer. Notebook 7's own keyboard shortcuts do when settings come
# before they are known; and jupyter-collaboration looks there for JupyterLab's status bar.
NOT_OURS = (
    "Could not restore the debugger state",
    "Canceled future for create_subshell_request",
    "Comm not found for comm id",
    "Cannot read properties of undefined (reading 'schema')",
    "Plugin '@jupyter/docprovider-extension:statusBarTimeline' failed to activate",
)
THEMES = {"light": ("true", "#fff", "#000000de"), "dark": ("false", "#111", "#ffffffde")}
OPEN = """async (path) => {
  const { context } = path ? await jupyterapp.commands.execute('docmanager:open', { path }) : jupyterapp.shell.currentWidget;
  await context.ready;
  await context.sessionContext.ready;
}"""
MOUNT = """async ([esm, css, state]) => {
  const plain = Object.fromEntries(Object.entries(state).map(([name, value]) => [name, value?.base64 === undefined ? value
    : new DataView(Uint8Array.from(atob(value.base64), (c) => c.charCodeAt(0)).buffer)]));
  const heard = {};
  window.model = {
    get: (name) => plain[name],
    on: (event, callback) => (heard[event] ??= new Set()).add(callback),
    off: (event, callback) => heard[event]?.delete(callback),
    set: (name, value) => { plain[name] = value; heard[`change:${name}`]?.forEach((callback) => callback()); },
    heard,
  };
  document.head.append(Object.assign(document.createElement('style'), { textContent: css }));
  const url = URL.createObjectURL(new Blob([esm], { type: 'text/javascript' }));
  window.stop = await (await import(url)).default.render({ model, el: document.getElementById('root') });
}"""


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        launched = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        launched.close()


@contextmanager
def watched(browser: Any) -> Iterator[Any]:
    """A page of its own. What it logs as an error, or asks of another machine, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    made = context.new_page()
    errors: list[str] = []
    far: list[str] = []
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("request", lambda r: far.append(r.url) if urlsplit(r.url).hostname not in (None, "localhost", "127.0.0.1", "") else None)
    yield made
    context.close()
    assert [error for error in errors if not any(known in error for known in NOT_OURS)] == []
    assert far == []


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """The page of most tests."""
    with watched(browser) as made:
        yield made


@pytest.fixture
def mount(page: Any) -> Callable[..., None]:
    """Shows a chart of `lora_nb.jupyter.charts` on a page without Jupyter, as anywidget would."""

    def show(chart: Any, theme: str = "light") -> None:
        light, ground, text = THEMES[theme]
        page.set_content(
            f'<html lang="en"><title>chart</title><body data-jp-theme-light="{light}" style="background:{ground};color:{text}">'
            '<main><h1>chart</h1><div id="root"></div></main></body></html>'
        )
        names = (name for name in chart.keys if not name.startswith("_") and name not in ("layout", "tabbable", "tooltip"))
        state = {name: getattr(chart, name) for name in names}
        sent = {n: {"base64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for n, v in state.items()}
        page.evaluate(MOUNT, [str(chart._esm), str(chart._css), json.loads(json.dumps(sent))])

    return show


@pytest.fixture
def axe(page: Any) -> Callable[..., list[str]]:
    """Serious and critical findings of axe-core, in one element of the page."""

    def findings(selector: str = "body") -> list[str]:
        if not AXE.exists():
            pytest.skip("needs axe-core: npm ci in widgets/")
        page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
        found = page.evaluate("(where) => axe.run(where)", selector)["violations"]
        grave = [v for v in found if v["impact"] in ("serious", "critical")]
        return [f"{v['id']}: {node['html'][:200]}" for v in grave for node in v["nodes"]]

    return findings


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `jupyter` serves."""
    return tmp_path_factory.mktemp("workspace")


@contextmanager
def served(workspace: Path, own: Path, *sandbox: str) -> Iterator[str]:
    """The address of a JupyterLab with the extension as it stands in the checkout, installed or not.

    `own` is for the server's own files; `sandbox` are the first words of its command line.
    """
    news = own / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # its question would cover a corner of every page
    (own / "labextensions").mkdir()
    (own / "labextensions/lora-nb").symlink_to(ROOT / "lora_nb/labextension")
    environment = os.environ | {name: str(own) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*sandbox, COLLABORATION or sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    words += [
        f"--port={port}",
        "--port-retries=0",
        "--IdentityProvider.token=t",
        f"--ServerApp.root_dir={workspace}",
        f"--ServerApp.base_url={BASE}",
    ]
    for app in ("LabApp", "JupyterNotebookApp"):  # Notebook 7 is served beside it, at /tree
        words += [f"--{app}.extra_labextensions_path={own / 'labextensions'}", f"--{app}.expose_app_in_browser=True"]
    words += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--log-level=ERROR"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=own) as server:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{BASE}api", timeout=5).close()
                break
            except OSError:
                server.poll()
                assert server.returncode is None, "JupyterLab ended before it answered"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}{BASE}lab?token=t&reset"
        server.terminate()


@pytest.fixture(scope="session")
def jupyter(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the JupyterLab that most tests share."""
    with served(workspace, tmp_path_factory.mktemp("jupyter")) as address:
        yield address


def start_lab(page: Any, address: str) -> Any:
    """Opens JupyterLab and waits until our part of it is there."""
    page.goto(address)
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('lora-nb:course')", timeout=60_000)
    page.evaluate("jupyterapp.restored")
    return page


@pytest.fixture
def lab(page: Any, jupyter: str) -> Any:
    """A page with a fresh JupyterLab."""
    return start_lab(page, jupyter)


@pytest.fixture
def second_lab(browser: Any, jupyter: str) -> Iterator[Any]:
    """Another person's page with the same JupyterLab."""
    with watched(browser) as page:
        yield start_lab(page, jupyter.replace("/lab?", "/lab/workspaces/second?"))


@pytest.fixture
def command(lab: Any) -> Callable[..., None]:
    """Runs a command of JupyterLab, and does not wait for its end."""

    def run(name: str, **arguments: object) -> None:
        lab.evaluate("([name, arguments]) => void jupyterapp.commands.execute(name, arguments)", [name, arguments])

    return run


@pytest.fixture
def save(lab: Any) -> Callable[[], None]:
    """Saves the notebook in front. With collaboration that happens by itself, and who asks for it meanwhile may wait for ever."""

    def wait() -> None:
        if COLLABORATION is None:
            lab.keyboard.press("Control+s")
        lab.wait_for_function("!jupyterapp.shell.currentWidget.context.model.dirty")

    return wait


@pytest.fixture
def theme(lab: Any, command: Callable[..., None]) -> Callable[[str], None]:
    """Changes to `"Light"` or `"Dark"`, and waits until it is there."""

    def change(name: str) -> None:
        command("apputils:change-theme", theme=f"JupyterLab {name}")
        lab.wait_for_selector(f"body[data-jp-theme-light={'true' if name == 'Light' else 'false'}]", state="attached")

    return change


@pytest.fixture
def write(workspace: Path) -> Callable[..., None]:
    """Makes a notebook of code cells."""

    def make(name: str, *sources: str) -> None:
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(made, workspace / name)

    return make


@pytest.fixture
def opened(lab: Any, write: Callable[..., None]) -> Callable[..., Any]:
    """Makes a notebook, opens it in JupyterLab, and gives its cells once its kernel is there."""

    def make(name: str, *sources: str) -> Any:
        write(name, *sources)
        lab.evaluate(OPEN, name)
        return lab.locator(".jp-NotebookPanel:visible .jp-CodeCell")

    return make


@pytest.fixture
def notebook7(page: Any, jupyter: str, write: Callable[..., None]) -> Callable[..., Any]:
    """The same in Notebook 7."""

    def make(name: str, *sources: str) -> Any:
        write(name, *sources)
        page.goto(f"{jupyter.partition('/lab')[0]}/notebooks/{name}?token=t")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget", timeout=60_000)
        page.evaluate(OPEN, "")
        return page.locator(".jp-CodeCell")

    return make


@pytest.fixture
def run(page: Any) -> Callable[[Any], None]:
    """Clicks into a cell and presses Shift+Enter."""

    def press(cell: Any) -> None:
        cell.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")

    return press
