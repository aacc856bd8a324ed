#!/usr/bin/env bash
# Prove what Binder will do, without Binder: its steps in an empty environment on a clone of the last commit, then the
# first notebook from top to bottom, with the peak of the kernel's memory. Fails above the 1 GB that Binder guarantees.
#
#     [PYTHON=python3.12] [TORCH_ARGS="--index-url …"] tools/prove_binder.sh
#
# Where PyTorch's index of CPU builds cannot be reached, torch is what pip finds with TORCH_ARGS.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git clone --quiet "$root" "$work/clone"
"${PYTHON:-python3}" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" PYTHONNOUSERSITE=1
cd "$work/clone"

# shellcheck disable=SC2086 # TORCH_ARGS is several words
pip install --no-cache-dir --retries 1 -r binder/requirements.txt ||
    pip install --no-cache-dir ${TORCH_ARGS:-} "$(grep '^torch==' constraints.txt)"
binder/postBuild

cd notebooks
python - 00_start.ipynb <<'PYTHON'
import sys
import threading
import time

import nbclient
import nbformat
import psutil

GUARANTEED = 1_000_000_000


def resident(process):
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def watch(done, peak):
    """Every 0.1 s, the sum over the kernel and its children: all that this process started."""
    while not done.wait(0.1):
        peak[0] = max(peak[0], sum(map(resident, psutil.Process().children(recursive=True))))


done, peak = threading.Event(), [0]
watcher = threading.Thread(target=watch, args=(done, peak))
watcher.start()
start = time.monotonic()
try:
    nbclient.NotebookClient(nbformat.read(sys.argv[1], as_version=4), timeout=600, kernel_name="python3").execute()
finally:
    done.set()
    watcher.join()
print(f"{sys.argv[1]}: {time.monotonic() - start:.0f} s, peak resident memory of the kernel {peak[0] / 1e6:.0f} MB")
sys.exit(peak[0] > GUARANTEED)
PYTHON
