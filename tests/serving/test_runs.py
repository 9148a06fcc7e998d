"""A run's record, as it goes on, as it is listed, and behind a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from tests.support.processes import HANG, REPO, put_for_python
from turbofit.cli.main import main
from turbofit.cli.options.common_options import server_of
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.process.files import state_dir
from turbofit.core.process.processes import start_time
from turbofit.core.run_report import RunReport
from turbofit.core.struct import decode
from turbofit.serving import runs
from turbofit.serving.runs import Record


def test_it_is_whole_after_every_change(tmp_path: Path, monkeypatch) -> None:
    record = Record(tmp_path, model="m", pretend=True)
    path = tmp_path / "run.json"
    assert json.loads(path.read_text())["state"] == "starting"
    record.attempt(memory_back=True)  # before the first start there is nothing to say it of
    record.begin(number=0)
    record.attempt(memory_back=True)
    with pytest.raises(TypeError):  # a field that no reader knows
        record.attempt(memory=True)
    record.event("grown", "somebody")
    record.change(state="ended", ended="SIGTERM")
    document = json.loads(path.read_text())
    assert document["attempts"][0]["memory_back"] is True
    assert document["events"][0]["kind"] == "grown"
    assert (document["state"], document["ended"], document["pretend"]) == ("ended", "SIGTERM", True)
    assert path.stat().st_mode & 0o077 == 0
    assert decode(path.read_bytes(), runs.RunRecord, what="run") == record.run
    report = decode(path.read_bytes(), RunReport, what="run")
    assert report.last is not None
    assert report.last.memory_back is True
    monkeypatch.setattr(runs, "write_atomic", lambda *_, **__: None)
    for number in range(1100):
        record.event("n", str(number))
    assert [one.text for one in record.run.events] == [str(n) for n in range(100, 1100)]


def test_a_disk_that_refuses_costs_the_record_only(tmp_path: Path) -> None:
    record = Record(tmp_path / "gone", model="m")
    record.begin()
    record.change(state="ready")
    assert not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()
    record.change()
    kept = (tmp_path / "gone" / "run.json").read_bytes()
    assert decode(kept, runs.RunRecord, what="run") == record.run


SERVER = """
import signal, sys
from pathlib import Path
from turbofit.serving.runs import Record
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
record = Record(Path(sys.argv[1]), model=sys.argv[2])
record.begin(requests_at_once=42)
record.change(state="ready", urls=("http://127.0.0.1:" + sys.argv[3],))
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
record.change(state="ended", ended="SIGTERM")
"""


def run_folder(name: str) -> Path:
    folder = state_dir("runs", make=True) / name
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def runs_of_this_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def servers() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Two processes with records as `serve` keeps them, by the names of their runs."""
    found = {}
    for number, model in enumerate(("First", "Second"), 1):
        folder = run_folder(f"2026010{number}-000000-{model}")
        (folder / "plan.json").write_text(plausible_plan().to_json())
        (folder / "engine-0.log").write_text("".join(f"line {i}\x1b\n" for i in range(300)))
        child = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), model, str(number)],
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
    folder = run_folder("20260101-000000-Qwen2-VL-7B-Instruct")
    Record(folder, model="Qwen2-VL-7B-Instruct").change(state="ready", urls=("http://127.0.0.1:1",))
    for name in ("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl-7b-instruct", folder.name):
        assert runs.chosen_run(name).name == folder.name
    for address in ("1", "127.0.0.1:1", "http://127.0.0.1:1/", "http://localhost:1/v1"):
        assert runs.chosen_run(address).name == folder.name
        assert runs.newest_run_of(address) == folder
    with pytest.raises(UsageError, match="runs here"):
        runs.chosen_run("http://another:1")
    assert runs.newest_run_of("qwen2-vl-7b") == folder
    assert runs.newest_run_of("internvl2-8b") is None


def test_models_of_one_process_are_listed_once_each_and_are_one_server() -> None:
    """Each start of a model that sleeps is a run, and so is each model of several."""
    for name, state in (("00-A", "ended"), ("01-B", "ended"), ("02-A", "ready")):
        Record(run_folder(f"20260101-0000{name}"), model=name[-1]).change(state=state)
    found = {one.record.model: (one.name, one.state) for one in runs.live_runs()}
    assert found == {"A": ("20260101-000002-A", "ready"), "B": ("20260101-000001-B", "asleep")}
    assert runs.chosen_run(None).record.model == "A"
    assert runs.chosen_run("B").name == "20260101-000001-B"


def test_those_that_live_are_listed_chosen_and_stopped(servers, capsys) -> None:
    assert [one.name for one in runs.live_runs()] == list(servers)
    assert runs.chosen_run("Second").record.model == "Second"
    for name, cause in ((None, "2 servers run here"), ("Third", "no server 'Third'")):
        with pytest.raises(UsageError, match=cause):
            runs.chosen_run(name)
    assert main(["ps"]) == 0
    said = capsys.readouterr().out
    assert "First" in said
    assert "http://127.0.0.1:1" in said
    assert main(["stop", "First"]) == 0
    assert servers["20260101-000000-First"].wait() == 0
    assert runs.chosen_run(None).record.model == "Second"
    assert main(["stop", "--all"]) == 0
    assert runs.live_runs() == []
    capsys.readouterr()
    assert main(["ps"]) == 0
    assert "no server of this user runs here" in capsys.readouterr().out
    assert main(["stop"]) == 2


def test_the_last_lines_of_a_log_and_how_many_requests_it_runs(servers, tmp_path, capsys) -> None:
    first, _ = servers
    assert main(["logs", first, "--lines", "2"]) == 0
    told = capsys.readouterr()
    assert told.out == "line 298?\nline 299?\n"  # without control characters
    assert f"{first}/engine-0.log:" in told.err
    plan = tmp_path / "plan.json"
    plan.write_text(plausible_plan().to_json())
    for words, cause in (
        ([first, "--lines", "0"], "--lines"),
        (["nosuch"], "error: no run is called 'nosuch'\nhint: turbofit report lists runs\n"),
        ([str(plan)], "is a plan, not a run"),
    ):
        assert main(["logs", *words]) == 2
        assert cause in capsys.readouterr().err
    assert runs.requests_at("http://localhost:2/") == 42
    assert runs.requests_at("http://127.0.0.1:3") == 0


def test_other_commands_know_a_server_that_runs(servers) -> None:
    first, second = servers
    assert runs.server_on(1).name == first
    assert runs.server_on(9) is None
    servers[second].kill()
    servers[second].wait()
    assert server_of(None, None)[0] == "http://127.0.0.1:1"
    for path in state_dir("runs").glob("*/run.json"):
        record = json.loads(path.read_bytes())
        path.write_text(json.dumps({**record, "state": "starting", "urls": []}))
    with pytest.raises(UnservedError, match=f"{first} is still starting"):
        server_of(None, None)


def test_of_several_servers_one_must_be_named_and_a_trial_is_no_server(servers, capsys) -> None:
    first, second = servers
    with pytest.raises(UsageError, match="2 servers run here") as caught:
        server_of(None, None)
    assert all(f"http://127.0.0.1:{port}" in caught.value.hint for port in (1, 2))
    path = state_dir("runs") / first / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "command": "tune"}))
    assert server_of(None, None)[0] == runs.chosen_run(None).record.urls[0]
    assert runs.chosen_run(None).name == second
    assert runs.chosen_run(first).name == first
    assert main(["ps"]) == 0
    assert "no server: tune" in capsys.readouterr().out


def test_a_log_is_followed_until_its_server_ends(servers) -> None:
    first, _ = servers
    words = [sys.executable, "-m", "turbofit", "logs", first, "--lines", "1", "-f"]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert [following.stdout.readline() for _ in range(2)][1] == "line 299?\n"
        with (state_dir("runs") / first / "engine-0.log").open("a") as file:
            file.write("more\n")
        assert following.stdout.readline() == "more\n"
        servers[first].kill()
        servers[first].wait()
        assert following.wait(HANG) == 0


def test_a_process_of_the_same_number_is_no_server() -> None:
    folder = run_folder("20260101-000000-m")
    ticks = Record(folder, model="m").run.pid_started
    (mine,) = runs.live_runs()
    assert mine.record.pid == os.getpid()
    path = folder / "run.json"
    path.write_text(path.read_text().replace(str(ticks), str(ticks + 1)))
    assert runs.live_runs() == []
    later = replace(mine.record, pid_started=ticks + 1)
    runs.stop_server(mine._replace(record=later), 1)  # and is sent no signal
    path.write_text("{")
    assert runs.live_runs() == []


@pytest.fixture
def serve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What runs in the place of ``python -m turbofit serve …``; by default it opens at once."""
    opens = 'echo "$@" >&2; echo http://127.0.0.1:5; exec sleep 1000'
    return lambda script=opens: put_for_python(tmp_path, monkeypatch, script)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM


def test_it_returns_once_the_address_is_open_and_the_server_stays(serve_is, capsys) -> None:
    serve_is()
    words = ["m", "-d", "--json", "--port", "5", "--pretend", "--", "--log-level", "INFO"]
    assert main(["serve", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["url"] == "http://127.0.0.1:5"
    assert start_time(told["pid"])
    said = Path(told["log"]).read_text()
    assert said == "-m turbofit serve m --port 5 --pretend -- --log-level INFO\n"
    assert os.getsid(told["pid"]) == told["pid"] != os.getsid(0)
    end(told["pid"])
    assert main(["serve", "m", "--cluster", "ray", "-d"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "http://127.0.0.1:5\n"
    pid = int(re.search(r"process (\d+) serves", shown.err)[1])
    assert f"turbofit cluster status --cluster ray shows it, kill {pid} ends it" in shown.err
    end(pid)


def test_a_server_that_does_not_open_gives_its_exit_code_and_its_lines(serve_is, capsys) -> None:
    assert main(["serve", "-d", "m", "--tp", "x"]) == 2  # before anything starts
    assert "--tp 'x'" in capsys.readouterr().err
    assert not list(Path(os.environ["XDG_STATE_HOME"]).glob("turbofit/detached/*"))
    serve_is("for i in $(seq 100); do echo line $i >&2; done; exit 3")
    assert main(["serve", "m", "--detach"]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    lines = "".join(f"line {number}\n" for number in range(1, 101))
    assert told.err.endswith(f"Ctrl-C ends it\n{lines}")  # each once, in their order


def test_the_phases_of_a_start_in_the_background_are_shown(serve_is, capsys) -> None:
    says = "to ask: a", "ready at http://127.0.0.1:5", "ready, on this machine only"
    phases = "[    1.0 s] engine: phase: starting", "loading weights: 1.0 GiB of 3.0 GiB …"
    script = "; ".join(f"echo '{line}' >&2" for line in (*phases, *says))
    serve_is(f"{script}; echo http://127.0.0.1:5; exec sleep 1000")
    assert main(["serve", "m", "-d"]) == 0
    first, *shown, last = capsys.readouterr().err.splitlines()
    assert (first, shown) == ("starting in the background; Ctrl-C ends it", [*phases])
    assert last.startswith("ready at http://127.0.0.1:5: process ")
    end(int(re.search(r"process (\d+) serves", last)[1]))


def test_ctrl_c_while_it_starts_ends_it(serve_is, tmp_path: Path) -> None:
    serve_is(f"echo $$ > {tmp_path}/pid; kill -INT {os.getpid()}; exec sleep 1000")
    with pytest.raises(KeyboardInterrupt):
        runs.serve_detached(["m"], print)
    assert not start_time(int((tmp_path / "pid").read_text()))
