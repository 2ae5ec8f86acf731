"""A live server in front of a browser and of other people's clients: `make test-serve`.

The tests run in `.venv`, and the server in their process, so that they can compare with what it writes without HTTP;
LiteLLM, LangChain and schemathesis run in an environment of their own, `.venvs/clients`. They are no part of
`make test`. What cannot be tested here is told at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from loudly import pytest_terminal_summary as pytest_terminal_summary
from loudly import skip_loudly
from servers import Live, fake_pair, live

from collm.models.info import CalibrationRow, CalibrationTable, CheckpointInfo

ROOT = Path(__file__).parent.parent
BIN = ROOT / ".venvs" / "clients" / "bin"
EXAMPLES = ("Nina packs 27 boxes of 48 pencils. How many pencils?", "What is <b>56 * 9</b>?")


def calibrated() -> CheckpointInfo:
    """Thresholds of the fake pair's gate, which is uniform: as it would be found."""
    rows = [
        CalibrationRow(target_rate=rate, achieved_rate=rate, threshold=1 - rate, log_odds=odds, metric_value=rate)
        for rate, odds in ((0.0, float("inf")), (0.25, 1.0986123), (0.5, 0.0), (0.75, -1.0986123), (1.0, float("-inf")))
    ]
    table = CalibrationTable(task="sums", metric="exact_match", seed=0, num_prompts=100, rows=rows, best=2)
    return CheckpointInfo(calibration=[table])


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    llm = fake_pair(seconds=0.002, max_model_len=1500, info=calibrated())
    with live(llm, examples=EXAMPLES) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        skip_loudly("the page in a browser: there is no chromium (apt-get install chromium, or CHROMIUM=path)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


def client(program: str, *arguments: str, seconds: float = 150) -> str:
    """What a program of the clients' environment says; it has to end well."""
    assert (BIN / "python").is_file(), f"there is no {BIN}: make test-serve makes it"
    path = BIN / program if (BIN / program).exists() else Path(__file__).parent / "clients" / program
    command = [str(path), *arguments] if path.parent == BIN else [str(BIN / "python"), str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": "", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none"}
    with tempfile.TemporaryDirectory() as here:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=here, check=False
        )
    assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-2000:])
    return done.stdout
