"""The control panel in a real browser: how soon a change is answered, and what it costs a training to be started there.

    python benchmarks/panel.py [--only changes|training] [--quick] [--out FILE]            writes benchmarks/results/panel.json

changes: milliseconds from an event in the form (rank, target modules, batch or quantization in turn) until the new numbers and the
  new bar of memory are in the page, the way to the kernel and back included.
training: from the end of the first step to that of the last, in the panel (a thread that draws a live curve and keeps a checkpoint
  every 100 steps) over the same run in a cell of the same notebook, in turn.

It needs Chromium, and playwright of the `test` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import nbformat
from measure import RESULTS, Line, Times, machine

SECONDS = 1000.0  # milliseconds, as Playwright counts
SESSION = "shell.currentWidget?.context?.sessionContext"
TARGETS = {"changes": "≤ 100", "training": "≤ 1.05"}
PANEL = """import json, time, torch
import lora_nb as ln
from lora_nb.jupyter import worker
from lora_nb.jupyter.panel import Panel
from lora_nb.jupyter.settings import Settings

times, original = {{"panel": [], "cell": []}}, worker.train
def clocked(where, *arguments, callbacks=(), **options):
    ends = []
    run = original(*arguments, callbacks=[*callbacks, lambda step: ends.append(time.perf_counter())], **options)
    times[where].append(ends[-1] - ends[0])
    return run
worker.train = lambda *arguments, **options: clocked("panel", *arguments, **options)
panel = Panel(Settings(max_steps={steps}, batch_size={batch}))
panel"""
CELL = """settings = panel.settings
model, tokenizer = ln.load(settings.base)
torch.manual_seed(settings.seed)
ln.attach(model, settings.adapter())
run = clocked("cell", model, tokenizer, ln.dataset(settings.data, "train"), settings.training())
print("round", len(times["cell"]))"""
FOUND = """print("found", json.dumps(times | {"threads": torch.get_num_threads()}))"""
# Change one field as the browser would, and wait for the bar of memory, which is sent after the numbers; then for one frame more.
CHANGE = """([label, value]) => new Promise((resolve, reject) => {
  const panel = document.querySelector('.lora-panel');
  const row = [...panel.querySelectorAll('label')].find((l) => l.textContent === label).parentElement;
  const field = row.querySelector('select, input');
  const numbers = panel.querySelector(':scope > .widget-html'), memory = panel.querySelector('.lora-bar');
  let last = 0;
  const seen = new MutationObserver((records) => {
    last = performance.now();
    if (!records.some((record) => memory.contains(record.target))) return;
    requestAnimationFrame(() => { seen.disconnect(); clearTimeout(late); resolve([last - start, numbers.innerText]); });
  });
  seen.observe(numbers, { childList: true, subtree: true, characterData: true });
  seen.observe(memory, { childList: true });
  const late = setTimeout(() => { seen.disconnect(); reject(new Error(`no answer to ${label} = ${value}`)); }, 10000);
  const start = performance.now();
  if (field.multiple) for (const option of field.options) option.selected = option.text.startsWith(value);
  else if (field.options) field.selectedIndex = [...field.options].findIndex((option) => option.text.replace(/\\s/g, ' ') === value);
  else field.value = value;
  for (const name of field.options ? ['change'] : ['input', 'change']) field.dispatchEvent(new Event(name, { bubbles: true }));
})"""
FIELDS = {
    "Rank r": ("8", "32", "1", "256", "4", "64", "2", "128", "16"),
    "Target modules": ("q_proj", "down_proj", "all-linear"),
    "Batch": ("8", "32", "4", "1", "64"),
    "Quantization": ("NF4", "int8, bitsandbytes", "NF4, double quantization", "none"),
}


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab that opens `00_start.ipynb` of the folder."""
    own = {name: str(folder / ".jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    words = [sys.executable, "-m", "lora_nb.cli", "lab", "--no-browser", "--folder", str(folder)]
    words += ["--jupyter=--LabApp.expose_app_in_browser=True"]  # to ask it whether the kernel is there
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | own) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        try:
            assert found, "JupyterLab does not start"
            wait_for(found[0], server)
            yield found[0]
        finally:
            server.terminate()


def wait_for(address: str, server: subprocess.Popen[str]) -> None:
    """Until the server answers."""
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()  # noqa: S310 - our own server
        except OSError:
            assert server.poll() is None, "JupyterLab ended before it answered"
            try:
                server.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        return
    raise TimeoutError(address)


@contextmanager
def notebook(steps: int, batch: int) -> Iterator[Any]:
    """A page with the panel in a running notebook."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (PANEL.format(steps=steps, batch=batch), CELL, FOUND)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    with tempfile.TemporaryDirectory() as name, sync_playwright() as play:
        nbformat.write(made, Path(name) / "00_start.ipynb")
        with lab(Path(name)) as address:
            browser = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(address)
            page.wait_for_function(f"window.jupyterapp?.{SESSION}", timeout=120 * SECONDS)
            page.evaluate(f"jupyterapp.{SESSION}.ready")
            run(page, 0)
            page.get_by_label("Rank r").wait_for(timeout=120 * SECONDS)
            page.wait_for_timeout(2 * SECONDS)
            yield page
            browser.close()


def run(page: Any, number: int) -> Any:
    """A cell, by Shift+Enter; gives it."""
    cell = page.locator(".jp-CodeCell").nth(number)
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    return cell


def bench_changes(*, quick: bool) -> list[dict[str, Any]]:
    """At least 60 changes."""
    turns = [zip(repeat(label), cycle(values), strict=False) for label, values in FIELDS.items()]
    found: dict[str, list[float]] = {label: [] for label in FIELDS}
    with notebook(steps=10, batch=16) as page:
        before = ""
        for label, value in islice((next(turn) for turn in cycle(turns)), 8 if quick else 80):
            milliseconds, numbers = page.evaluate(CHANGE, [label, value])
            assert label in {"Batch", "Quantization"} or numbers != before, "the numbers are still those of before"
            before = numbers
            found[label].append(milliseconds)
            page.wait_for_timeout(200)
    rows = [row(f"change of {label}", values) for label, values in found.items()]
    return [row("any change", [v for values in found.values() for v in values], TARGETS["changes"]), *rows]


def row(what: str, values: list[float], target: str = "") -> dict[str, Any]:
    """The 95th percentile, with the median and the slowest."""
    high = statistics.quantiles(values, n=20, method="inclusive")[-1]
    note = f"median {statistics.median(values):.0f}, slowest {max(values):.0f}, of {len(values)}"
    return said(Line(f"{what} to new numbers, ms, 95th percentile", None, high, target, note))


def bench_training(*, quick: bool) -> list[dict[str, Any]]:
    """Rounds of both, after one that does not count."""
    rounds, steps, batch = (2, 10, 2) if quick else (7, 120, 8)
    with notebook(steps, batch) as page:
        for number in range(1, rounds + 2):
            for where in ("panel", "cell") if number % 2 else ("cell", "panel"):
                in_the_panel(page) if where == "panel" else in_a_cell(page, number)
        text = run(page, 2).get_by_text(re.compile("^found ")).inner_text(timeout=10 * SECONDS)
    found = json.loads(text.removeprefix("found "))
    times = Times({name: found[name][1:] for name in ("panel", "cell")})
    low, high = times.spread("panel", "cell")
    note = f"middle half {low:.3f} to {high:.3f}; medians {times.median('panel'):.2f} s and {times.median('cell'):.2f} s for {steps} steps"
    ratio = times.ratio("panel", "cell")
    return [said(Line("training from the panel / the same run in a cell", found["threads"], ratio, TARGETS["training"], note))]


def in_the_panel(page: Any) -> None:
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text(re.compile(r"Step \d+ of")).wait_for(timeout=60 * SECONDS)
    page.get_by_text(re.compile(r"Done after")).wait_for(timeout=300 * SECONDS)
    page.wait_for_timeout(0.5 * SECONDS)


def in_a_cell(page: Any, number: int) -> None:
    run(page, 1).get_by_text(f"round {number}", exact=True).wait_for(timeout=300 * SECONDS)
    page.wait_for_timeout(0.5 * SECONDS)


def said(line: Line) -> dict[str, Any]:
    print(f"{line.measure:60} {line.value:8.3f}  {line.target:7} {line.met:4} {line.note}", flush=True)
    return asdict(line) | {"met": line.met}


SECTIONS = {"changes": bench_changes, "training": bench_training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS), help="this section alone; the other keeps what it had")
    parser.add_argument("--quick", action="store_true", help="a few changes and steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "panel.json")
    args = parser.parse_args()
    sections: dict[str, Any] = json.loads(args.out.read_text())["sections"] if args.out.exists() else {}
    for name, bench in SECTIONS.items():
        if args.only not in {None, name}:
            continue
        sections[name] = {"machine": machine(), "rows": bench(quick=args.quick)}
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"sections": sections}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
