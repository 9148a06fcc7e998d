"""What a module of LMDeploy sees where `entry` runs it, and what it must not keep or print."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbofit.core.plan import Command
from turbofit.serving.engine import entry
from turbofit.serving.engine.launches import KEY, Launch
from turbofit.serving.engine.lmdeploy import module_runner
from turbofit.serving.images import preparation


def run_module(folder: Path, name: str, code: str, **environ: str) -> list[str]:
    """What a module says, as LMDeploy's is run."""
    (folder / f"{name}.py").write_text(code)
    command = Command(env=environ, argv=("lmdeploy", "serve", "--server-port", "7"))
    start = Launch(command, module_runner(name), "secret").start_command(0)
    assert "secret" not in " ".join(start.argv)
    done = subprocess.run(
        start.argv, env={**start.env, "PYTHONPATH": str(folder)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_what_an_engine_sees(tmp_path: Path) -> None:
    """Its key, which stands in no command line and is not handed on to what the engine starts."""
    code = "import os, sys\nprint(*sys.argv[1:], os.getenv('TURBOFIT_ENGINE_KEY'), os.getenv('A'))"
    (words,) = run_module(tmp_path, "dumps", code, A="1")
    assert words == "serve --server-port 7 --api-keys secret None 1"
    # One of the user's own is on the command line already.
    command = Command(env={}, argv=("lmdeploy", "--api-keys", "mine"))
    assert KEY not in Launch(command, module_runner("x"), "mine").start_command(0).env
    # A script's folder comes first on its path; ours has a module named like many others.
    path = run_module(tmp_path, "looks", "import sys\nprint('\\n'.join(sys.path))\n")
    assert not any(folder.endswith("turbofit/serving") for folder in path)


def test_an_engine_keeps_no_urls(tmp_path: Path) -> None:
    """LMDeploy parses each image's data: URL, and Python kept the last 128 of them twice."""
    code = (
        "from urllib.parse import urlparse, urlsplit\n"
        "print(urlparse('data:image/png;base64,AAAA').path)\n"
        "print(urlsplit.cache_info().currsize)\n"
    )
    assert run_module(tmp_path, "parses", code) == ["image/png;base64,AAAA", "0"]


def test_a_warning_about_stop_words_is_logged_without_them() -> None:
    """A client's words stand in no log."""
    record = logging.makeLogRecord(
        {"funcName": "indexes_containing_token", "msg": "no token: %s", "args": ("secret",)}
    )
    assert entry.without_texts(record)
    assert record.getMessage() == "a stop word has no token of its own, or too many"


@pytest.mark.parametrize(("threads", "looked"), [(None, False), ("2", True)])
def test_a_model_without_images_starts_as_it_did(tmp_path, threads, looked):
    """Its process imports nothing of this."""
    (tmp_path / "engine.py").write_text(
        f"import sys; print({preparation.__name__!r} in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    if threads:
        environment[preparation.THREADS] = threads
    words = [sys.executable, entry.__file__, "engine"]
    told = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == f"{looked}\n"
