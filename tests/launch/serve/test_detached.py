from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from turbofit.cli.main import main
from turbofit.launch.engine.proc import start_time
from turbofit.launch.serve.detached import serve_detached


@pytest.fixture(autouse=True)
def state_of_this_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def serve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What runs in the place of ``python -m turbofit serve …``."""

    def put(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def test_it_returns_once_the_address_is_open_and_the_server_stays(serve_is, capsys) -> None:
    serve_is('echo "$@" >&2; echo http://127.0.0.1:5; exec sleep 1000')
    words = ["m", "-d", "--json", "--port", "5", "--pretend", "--", "--log-level", "INFO"]
    assert main(["serve", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["url"] == "http://127.0.0.1:5"
    assert start_time(told["pid"])
    said = Path(told["log"]).read_text()
    assert said == "-m turbofit serve m --port 5 --pretend -- --log-level INFO\n"
    assert os.getsid(told["pid"]) == told["pid"] != os.getsid(0)
    os.kill(told["pid"], signal.SIGTERM)
    assert os.waitpid(told["pid"], 0)[1] == signal.SIGTERM


def test_a_server_that_does_not_open_gives_its_exit_code_and_its_last_lines(
    serve_is, capsys
) -> None:
    serve_is("for i in $(seq 100); do echo line $i >&2; done; exit 3")
    assert main(["serve", "m", "--detach"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "line 81\n" in told.err
    assert "line 80\n" not in told.err
    assert told.err.endswith("line 100\n")


def test_wrong_use_is_told_before_anything_starts(capsys) -> None:
    assert main(["serve", "-d", "m", "--tp", "x"]) == 2
    assert "--tp 'x'" in capsys.readouterr().err
    assert not list(Path(os.environ["XDG_STATE_HOME"]).glob("turbofit/detached/*"))


def test_ctrl_c_while_it_starts_ends_it(serve_is, tmp_path: Path) -> None:
    serve_is(f"echo $$ > {tmp_path}/pid; kill -INT {os.getpid()}; exec sleep 1000")
    with pytest.raises(KeyboardInterrupt):
        serve_detached(["m"])
    assert not start_time(int((tmp_path / "pid").read_text()))
