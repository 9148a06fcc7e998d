"""A process that stands by becomes an engine as a new process would be one, or none does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import REPO, alive, gone
from tests.support.waiting import HANG, until
from turbofit.serving.engine import standby
from turbofit.serving.engine.launches import KEY
from turbofit.serving.engine.lmdeploy import ENTRY
from turbofit.serving.engine.standby import LEAST_AVAILABLE, STANDBY_BYTES, StandbyStarter

#: Says what it is, and stays.
ENGINE = """
import json, os, sys
import imported
print(json.dumps({
    "pid": os.getpid(), "group": os.getpgrp(), "words": sys.argv, "imported": imported.BY,
    "input": os.readlink("/proc/self/fd/0"),
    **{name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SETTING", "%s")},
}), flush=True)
import signal
signal.pause()
"""
IMPORTED = """
import sys
BY = sys.argv[1]
"""


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An engine's environment, in which its module is, and one that fails when it is imported."""
    (tmp_path / "pretty_engine.py").write_text(ENGINE % KEY, encoding="utf-8")
    (tmp_path / "imported.py").write_text(IMPORTED, encoding="utf-8")
    (tmp_path / "fails.py").write_text("raise AttributeError('no library')", encoding="utf-8")
    monkeypatch.setitem(vars(standby)["_IMPORTS"], "pretty_engine", ("fails", "imported"))
    return {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "SETTING": "1", KEY: "secret"}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def starter(said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[StandbyStarter]:
    """One that looks whenever it is asked to."""
    monkeypatch.setattr(standby, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(standby, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(standby, "_ANSWER_SECONDS", HANG)
    kept = StandbyStarter(lambda: 2 * LEAST_AVAILABLE, said.append)
    yield kept
    kept.end()


def pid_of(starter: StandbyStarter) -> int | None:
    """The process that stands by."""
    kept: standby.Standby | None = vars(starter)["_standby"]
    return None if kept is None else kept.pid


class Engines:
    """Begins engines, and ends them."""

    def __init__(self, starter: StandbyStarter, env: dict[str, str]) -> None:
        self._keeper, self._env = starter, env
        self.processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, card: str, *words: str, **more: str) -> dict[str, Any]:
        """What an engine says of itself."""
        env = {**self._env, "CUDA_VISIBLE_DEVICES": card, **more}
        process = self._keeper.spawn((sys.executable, ENTRY, "pretty_engine", *words), env)
        self.processes.append(process)
        assert process.stdout is not None
        facts: dict[str, Any] = json.loads(process.stdout.readline())
        assert facts["pid"] == facts["group"] == process.pid
        return facts


@pytest.fixture
def engines(starter: StandbyStarter, env: dict[str, str]) -> Iterator[Engines]:
    begun = Engines(starter, env)
    yield begun
    for process in begun.processes:
        process.kill()
        process.communicate()


def test_it_becomes_the_next_engine(starter: StandbyStarter, engines: Engines) -> None:
    """Words, key, cards, input and group are as of a new process; its imports are behind it."""
    starter.look()
    assert pid_of(starter) is None  # nobody knows yet what an engine is
    first = engines.spawn("GPU-a", "--port", "1")
    assert (first["imported"], first["words"][1:3]) == ("--port", ["--port", "1"])
    starter.look()
    pid = pid_of(starter)
    assert pid is not None
    second = engines.spawn("GPU-b", "--port", "2")
    assert (second["pid"], pid_of(starter)) == (pid, None)
    assert second["imported"] == "--standby"
    differs = {name for name in first if first[name] != second[name]}
    assert differs == {"pid", "group", "imported", "words", "CUDA_VISIBLE_DEVICES"}
    assert second["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert second["words"][1:] == ["--port", "2", "--api-keys", "secret"]
    assert second[KEY] is None
    starter.look()
    assert pid_of(starter) not in (None, pid)


def test_the_first_engine_finds_its_imports_done(
    starter: StandbyStarter, engines: Engines, env: dict[str, str]
) -> None:
    starter.expect((sys.executable, ENTRY, "pretty_engine"), env)
    starter.look()
    pid = pid_of(starter)
    first = engines.spawn("GPU-a")
    assert (first["pid"], first["imported"]) == (pid, "--standby")


def test_what_an_import_may_read_is_as_at_its_start(
    starter: StandbyStarter, engines: Engines
) -> None:
    engines.spawn("GPU-a")
    starter.look()
    pid = pid_of(starter)
    other = engines.spawn("GPU-a", SETTING="2")
    assert other["pid"] != pid
    assert other["SETTING"] == "2"
    starter.look()
    assert pid_of(starter) not in (None, pid)
    assert pid is not None
    assert not alive(pid)
    assert engines.spawn("GPU-a", SETTING="2")["imported"] == "--standby"


@pytest.mark.parametrize(
    ("available", "needed", "there"),
    [
        (LEAST_AVAILABLE - 1, 0, False),
        (LEAST_AVAILABLE, 0, True),
        (2 * LEAST_AVAILABLE, 2 * LEAST_AVAILABLE - STANDBY_BYTES + 1, False),
        (2 * LEAST_AVAILABLE, 2 * LEAST_AVAILABLE - STANDBY_BYTES, True),
    ],
)
def test_none_where_the_host_lacks_memory(
    available: int, needed: int, there: bool, starter: StandbyStarter, engines: Engines
) -> None:
    vars(starter)["_available"] = lambda: available
    engines.spawn("GPU-a")
    starter.look(needed)
    assert (pid_of(starter) is not None) == there
    if there:  # it stays where somewhat less is left, and goes where half is
        for left, stays in ((available * 3 // 4, True), (available // 2 - 1, False)):
            vars(starter)["_available"] = lambda left=left: left
            starter.look(needed)
            assert (pid_of(starter) is not None) == stays


def kill(starter: StandbyStarter) -> int:
    """Kill what stands by; the process that it was."""
    pid = pid_of(starter)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    return pid


@pytest.mark.parametrize("seen", [True, False])
def test_one_that_was_killed_is_replaced(
    seen: bool, starter: StandbyStarter, engines: Engines, said: list[str]
) -> None:
    """Whether somebody looks before the next engine begins, or the engine's start finds it."""
    engines.spawn("GPU-a")
    starter.look()
    before = kill(starter)
    if seen:
        starter.look()
        assert pid_of(starter) is None
        assert said[-1] == "warning: a standby ended by itself: another begins in 0 s"
    assert engines.spawn("GPU-a")["imported"] != "--standby"
    starter.look()
    after = pid_of(starter)
    assert after not in (None, before)
    assert engines.spawn("GPU-a")["pid"] == after


def test_one_that_does_not_run_becomes_no_engine(
    starter: StandbyStarter, engines: Engines, env: dict[str, str], said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(standby, "_ANSWER_SECONDS", 0.1)
    starter.expect((sys.executable, ENTRY, "pretty_engine"), env)
    starter.look()
    pid = pid_of(starter)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state_of(pid) == "T", "it to stop")
    assert engines.spawn("GPU-a")["pid"] != pid
    assert "the standby does not answer" in said[-1]
    assert gone(pid)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_standby_whose_import_opens_a_card_ends(
    starter: StandbyStarter, env: dict[str, str], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    card, folder = tmp_path / "card", env["PYTHONPATH"]
    card.touch()
    lines = f"if BY == '--standby':\n    open({str(go)!r}).read()\n    CARD = open({str(card)!r})\n"
    Path(folder, "imported.py").write_text(IMPORTED + lines, encoding="utf-8")
    # What has this name is a card.
    Path(folder, "sitecustomize.py").write_text(
        "import os\nlink = os.readlink\n"
        f"os.readlink = lambda at: link(at).replace({str(card)!r}, '/dev/nvidia0')\n"
    )
    starter.expect((sys.executable, ENTRY, "pretty_engine"), env)
    starter.look()
    pid = pid_of(starter)
    assert pid is not None
    go.write_text("")
    assert gone(pid)


def test_no_other_program_has_a_standby(starter: StandbyStarter, env: dict[str, str]) -> None:
    for argv in (("sleep", "0"), (sys.executable, ENTRY, "another_module")):
        assert standby.kind_of(argv, env) is None
    preloaded = {**env, "LD_PRELOAD": "libturbofit_pretend.so"}
    assert standby.kind_of((sys.executable, ENTRY, "pretty_engine"), preloaded) is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_server(number: signal.Signals, env: dict[str, str]) -> None:
    """Though it is in the middle of an import that takes for ever, and whatever ends the server."""
    Path(env["PYTHONPATH"], "imported.py").write_text("import signal; signal.pause()")
    script = (
        "import sys, time\n"
        "from turbofit.serving.engine import standby\n"
        "standby._IMPORTS['pretty_engine'] = ('imported',)\n"
        "env = dict(PYTHONPATH=sys.argv[1])\n"
        "kind = standby.kind_of((sys.executable, standby.ENTRY, 'pretty_engine'), env)\n"
        "print(standby.Standby(kind).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    argv = [sys.executable, "-c", script, env["PYTHONPATH"]]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=REPO) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        until(lambda: b"--standby" in Path(f"/proc/{pid}/cmdline").read_bytes(), "it to stand by")
        server.send_signal(number)
    assert gone(pid)
