from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from tests.support.processes import REPO
from turbofit.cli.main import main
from turbofit.core.errors import UsageError
from turbofit.core.process.state import state_dir
from turbofit.launch.serve.runs import (
    Record,
    chosen_run,
    live_runs,
    newest_run_of,
    requests_at,
    stop_server,
    waiting_words,
)

SERVER = """
import signal, sys
from pathlib import Path
from turbofit.core.plan import Settings
from turbofit.launch.serve.runs import Record
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
record = Record(Path(sys.argv[1]), model=sys.argv[2])
record.begin(settings=Settings(max_batch_size=21), groups=((0,), (1,)))
record.state("ready", urls=("http://127.0.0.1:" + sys.argv[3],))
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
record.state("ended", ended="SIGTERM")
"""


@pytest.fixture(autouse=True)
def runs_of_this_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def servers() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Two processes with records as `serve` keeps them, by the names of their runs."""
    found = {}
    for number, model in enumerate(("First", "Second")):
        folder = state_dir("runs", make=True) / f"2026010{number + 1}-000000-{model}"
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(plausible_plan().to_json())
        (folder / "engine-0.log").write_text("".join(f"line {i}\x1b\n" for i in range(300)))
        child = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), model, str(number + 1)],
            cwd=REPO, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        found[folder.name] = child
    yield found
    for child in found.values():
        child.kill()
        child.communicate()


def test_a_server_has_the_names_that_serve_takes() -> None:
    model = "Qwen2-VL-7B-Instruct"
    folder = state_dir("runs", make=True) / f"20260101-000000-{model}"
    folder.mkdir(parents=True)
    Record(folder, model=model).state("ready", urls=("http://127.0.0.1:1",))
    for name in ("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl-7b-instruct", folder.name):
        assert chosen_run(name).name == folder.name
    assert newest_run_of("qwen2-vl-7b") == folder
    assert newest_run_of("internvl2-8b") is None


def test_those_that_live_are_listed_chosen_and_stopped(servers, capsys) -> None:
    assert [one.name for one in live_runs()] == list(servers)
    assert chosen_run("Second").record.model == "Second"
    with pytest.raises(UsageError, match="2 servers run here"):
        chosen_run(None)
    with pytest.raises(UsageError, match="no server 'Third'"):
        chosen_run("Third")
    assert main(["ps"]) == 0
    said = capsys.readouterr().out
    assert "First" in said
    assert "http://127.0.0.1:1" in said
    assert main(["stop", "First"]) == 0
    assert servers["20260101-000000-First"].wait() == 0
    assert chosen_run(None).record.model == "Second"
    assert main(["stop", "--all"]) == 0
    assert live_runs() == []
    capsys.readouterr()
    assert main(["ps"]) == 0
    assert "no server of this user runs here" in capsys.readouterr().out
    assert main(["stop"]) == 2


def test_the_last_lines_of_a_log_are_shown_without_control_characters(servers, capsys) -> None:
    first, _ = servers
    assert main(["logs", first, "--lines", "2"]) == 0
    told = capsys.readouterr()
    assert told.out == "line 298?\nline 299?\n"
    assert f"{first}/engine-0.log:" in told.err
    assert main(["logs", first, "--lines", "0"]) == 2


def test_logs_of_no_run_lead_to_the_runs(tmp_path: Path, capsys) -> None:
    assert main(["logs", "nosuch"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no run is called 'nosuch'", "hint: turbofit report lists runs",
    ]  # fmt: skip
    plan = tmp_path / "plan.json"
    plan.write_text(plausible_plan().to_json())
    assert main(["logs", str(plan)]) == 2
    assert "is a plan, not a run" in capsys.readouterr().err


def test_a_process_of_the_same_number_is_no_server(tmp_path: Path) -> None:
    folder = state_dir("runs", make=True) / "20260101-000000-m"
    folder.mkdir(parents=True)
    record = Record(folder, model="m")
    (mine,) = live_runs()
    assert mine.record.pid == record.run.pid
    path = folder / "run.json"
    ticks = record.run.pid_started
    path.write_text(path.read_text().replace(str(ticks), str(ticks + 1)))
    assert live_runs() == []
    later = replace(mine.record, pid_started=ticks + 1)
    stop_server(mine._replace(record=later), 1)  # and is sent no signal
    path.write_text("{")
    assert live_runs() == []


def test_models_of_one_process_are_listed_once_each_and_are_one_server() -> None:
    """Each start of a model that sleeps is a run, and so is each model of several."""
    for name, model, state in (
        ("20260101-000000-a", "A", "ended"), ("20260101-000001-b", "B", "ended"),
        ("20260101-000002-a", "A", "ready"),
    ):  # fmt: skip
        folder = state_dir("runs", make=True) / name
        folder.mkdir(parents=True)
        Record(folder, model=model).state(state)
    found = {one.record.model: (one.name, one.state) for one in live_runs()}
    assert found == {"A": ("20260101-000002-a", "ready"), "B": ("20260101-000001-b", "asleep")}
    assert chosen_run(None).record.model == "A"
    assert chosen_run("B").name == "20260101-000001-b"


def test_a_load_is_told_how_many_of_its_requests_wait(servers, capsys) -> None:
    assert requests_at("http://localhost:2/") == 42
    assert requests_at("http://127.0.0.1:3") == 0
    assert waiting_words(42, 42) == waiting_words(8, 0) == ""
    assert main(["bench", "http://127.0.0.1:1", "--concurrency", "64", "--seconds", "1"]) == 3
    said = "64 requests at once are sent; the server runs 42 of them at once, the others wait"
    assert said in capsys.readouterr().err
