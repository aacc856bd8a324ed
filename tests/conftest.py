"""What all tests share: no network, one seed, and a reason for each test that this machine cannot run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, so it comes before everything else

import shutil
import signal

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in whatever a shell starts in the background; tests interrupt themselves
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


def pytest_runtest_setup(item):
    marks = {mark.name for mark in item.iter_markers()}
    if "gpu" in marks and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if "network" in marks and os.environ["HF_HUB_OFFLINE"] != "0":
        pytest.skip("needs the Hub: set HF_HUB_OFFLINE=0")
    if "browser" in marks and CHROMIUM is None:
        reason = f"needs Chromium: no {', '.join(BROWSERS)} on the PATH"
        if os.environ.get("LORA_NB_REQUIRE_BROWSER") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium():
    """The path of the browser that tests marked `browser` drive."""
    return CHROMIUM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
