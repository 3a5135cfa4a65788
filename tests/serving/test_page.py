"""The status page in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.test_http import TOKEN, embed, served

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic", "--no-sandbox")  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def address(calibrated: Path) -> Iterator[str]:
    with served(calibrated, "--slo-ms", "10000") as (found, _):
        yield found


def shown(address: str, profile: Path, *options: str) -> str:
    """The page as the browser has it after a while."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=3000", *options]
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


def text_of(page: str, name: str) -> str:
    found = re.search(rf'id="{name}"[^>]*>([^<]*)<', page)
    assert found, name
    return found[1]


def test_a_browser_shows_ratio_load_and_latency(address: str, tmp_path: Path) -> None:
    going = threading.Event()
    going.set()

    def ask() -> None:
        while going.is_set():
            embed(address, ratio=4)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(2.5)  # the page shows whole seconds
    try:
        page = shown(f"{address}/", tmp_path)
    finally:
        going.clear()
        asking.join()
    model = httpx.get(f"{address}/info").json()["model_id"]
    assert text_of(page, "model") == model and text_of(page, "ratio") == "4" and text_of(page, "slo") == "10000"
    assert float(text_of(page, "load")) > 0 and float(text_of(page, "latency")) > 0
    assert "waiting for the first numbers" not in page
    for name in ("loads", "latencies", "ratios"):
        drawing = re.search(rf'<svg id="{name}".*?</svg>', page, re.DOTALL)
        assert drawing and drawing[0].count("<rect") >= 1, name


def test_a_page_without_its_token_asks_for_it(calibrated: Path, tmp_path: Path) -> None:
    with served(calibrated, token=TOKEN) as (address, _):
        page = shown(f"{address}/", tmp_path)
    assert "asks for its token" in text_of(page, "engine") and '<form id="ask">' in page.replace(
        ' hidden=""', " hidden"
    )
    assert text_of(page, "ratio") == "–"
