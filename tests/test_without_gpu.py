"""The script that makes an environment for pretend GPUs serves a model of the PyTorch engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import Child, free_port
from tests.support.serving import Served, image

pytestmark = pytest.mark.exhaustive  # it downloads torch, and waits for an index

ROOT = Path(__file__).resolve().parent.parent
LLAVA = ("llava-1.5-7b", "--on", "1xl4:free=19GiB", "--pretend")


def test_the_script_makes_an_environment_that_serves_llava_on_its_engine(
    children: list[Child], tmp_path: Path
) -> None:
    if not (ROOT / "scripts").is_dir():
        pytest.skip("no scripts here")
    venv, port = tmp_path / "venv", free_port()
    script = [str(ROOT / "scripts" / "without-gpu"), "--pytorch"]
    environ = os.environ | {"VENV": str(venv), "PYTHON": sys.executable}
    subprocess.run(script, check=True, env=environ, timeout=1800)
    assert not list(venv.glob("lib/python3.*/site-packages/nvidia/"))  # no CUDA libraries
    words = ["serve", *LLAVA, "--port", str(port), "--no-standby"]
    state = tmp_path / "state"
    child = Child(
        [str(venv / "bin" / "turbofit"), *words], standin=False, XDG_STATE_HOME=str(state),
        TURBOFIT_LEASES=str(tmp_path / "leases"), PYTHONPATH="",
    )  # fmt: skip
    children.append(child)
    served = Served(child, port, state)
    served.wait()
    status, headers, answer = served.chat(image(640, 480))
    assert (status, headers["x-turbofit-pretend"]) == (200, "1")
    assert answer["usage"]["prompt_tokens"] >= 576


def test_an_option_that_the_script_lacks_is_refused() -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "without-gpu"), "--vllm"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "without-gpu: --vllm is no option of it; --pytorch is\n",
    )  # fmt: skip
