from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.processes import put_for_python
from tests.support.waiting import HANG
from turbofit.cli.main import main
from turbofit.launch.engine.kernel import start_time
from turbofit.launch.serve.runs import DETACHED, end_without_lease, serve_detached


@pytest.fixture(autouse=True)
def state_of_this_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def serve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What runs in the place of ``python -m turbofit serve …``."""
    return partial(put_for_python, tmp_path, monkeypatch)


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


def test_a_cluster_is_served_in_the_background_too(serve_is, capsys) -> None:
    serve_is('echo "$@" >&2; echo http://127.0.0.1:5; exec sleep 1000')
    assert main(["serve", "m", "--cluster", "ray", "-d"]) == 0
    told = capsys.readouterr()
    assert told.out == "http://127.0.0.1:5\n"
    pid = int(re.search(r"process (\d+) serves", told.err)[1])
    assert f"turbofit cluster status --cluster ray shows it, kill {pid} ends it" in told.err
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM


@pytest.mark.parametrize("words", [["-dv"], ["-d"], []])
def test_a_server_in_the_background_starts_no_other(
    words: list[str], serve_is, monkeypatch, capsys
) -> None:
    """Nor does its stdout, where the address is waited for, become JSON."""
    serve_is(f'echo "${DETACHED}" >&2; exit 3')
    monkeypatch.setenv("TURBOFIT_SERVE_DETACH", "1")
    monkeypatch.setenv("TURBOFIT_SERVE_JSON", "1")
    assert main(["serve", "m", *words]) == 3
    assert capsys.readouterr().err.endswith("\n1\n")
    monkeypatch.setenv(DETACHED, "1")
    started: list[object] = []
    monkeypatch.setattr("turbofit.launch.serve.runs.serve_detached", started.append)
    shown: list[bool] = []
    monkeypatch.setattr(
        "turbofit.cli.commands.serve._one_model",
        lambda *given: shown.append(given[-1].as_json) or 0,
    )
    assert main(["serve", "m", *words, "--pretend", "--on", "1xrtx3090"]) == 0
    assert (started, shown) == ([], [False])


def test_wrong_use_is_told_before_anything_starts(capsys) -> None:
    assert main(["serve", "-d", "m", "--tp", "x"]) == 2
    assert "--tp 'x'" in capsys.readouterr().err
    assert not list(Path(os.environ["XDG_STATE_HOME"]).glob("turbofit/detached/*"))


def test_ctrl_c_while_it_starts_ends_it(serve_is, tmp_path: Path) -> None:
    serve_is(f"echo $$ > {tmp_path}/pid; kill -INT {os.getpid()}; exec sleep 1000")
    with pytest.raises(KeyboardInterrupt):
        serve_detached(["m"])
    assert not start_time(int((tmp_path / "pid").read_text()))


def test_a_server_whose_lease_nobody_renews_ends_in_order(tmp_path: Path) -> None:
    lease, ended = tmp_path / "lease", threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        lease.touch()
        watch = end_without_lease(lease, seconds=1.0, look=0.01)
        for number in range(1, 31):  # its clock may be anything
            os.utime(lease, (number, number))
            time.sleep(0.05)
        assert watch.is_alive()
        watch.join(HANG)
        assert ended.wait(HANG)
    finally:
        signal.signal(signal.SIGTERM, before)
