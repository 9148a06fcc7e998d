"""Some hostile requests against LMDeploy on a pretend GPU; thousands are `bench/gateway`'s."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import children  # noqa: F401 - a fixture
from tests.support.processes import Child
from tests.support.serving import serve_pretend
from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]
for needed in ("lmdeploy", "fastapi", "torchvision"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed}", allow_module_level=True)


def test_no_client_takes_the_server_past_the_plan(
    children: list[Child],  # noqa: F811
    tmp_path: Path,
) -> None:
    words = ("qwen2-vl-7b", "--on", "1xrtx3090", "--max-pixels", "1003520", "--no-rehearse")
    served = serve_pretend(children, tmp_path, *words)
    served.wait()
    url = f"http://127.0.0.1:{served.port}"
    argv = [sys.executable, "-m", "bench.gateway.hostile", url]
    argv += ["--requests", "60", "--reach", "20", "--minutes", "60", "--seed", "4"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert served.ask("/health")[0] == 200
