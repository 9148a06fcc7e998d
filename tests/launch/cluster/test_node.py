"""A node's actor, without Ray: it starts a server, or adopts one that lives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.processes import put_for_python
from tests.support.waiting import until
from turbofit.launch.cluster import node as module
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.node import NodeActor
from turbofit.launch.engine.kernel import start_time

ACTORS: list[NodeActor] = []
SERVER = """
trap "exit 0" TERM; echo "$@" > words; env > env; echo http://127.0.0.1:5
while :; do sleep 0.05; done
"""


@pytest.fixture
def serve_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """What runs in the place of ``python -m turbofit serve …``."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(module, "_TICK", 0.02)
    monkeypatch.setattr(module, "_PAUSES", (0.05, 0.05))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)

    yield partial(put_for_python, tmp_path, monkeypatch)
    while ACTORS:
        ACTORS.pop()._gone.set()
    for found in (tmp_path / "state").rglob("pid"):
        with suppress(ProcessLookupError):
            os.kill(int(found.read_text().split()[0]), signal.SIGKILL)


def actor(run: str = "run") -> NodeActor:
    ACTORS.append(NodeActor(run, "a" * 56, "127.0.0.1", 0))
    return ACTORS[-1]


def opened(made: NodeActor, digest: str):
    return until(
        lambda: (
            made.tell() if (made.tell().state, made.tell().digest) == ("open", digest) else None
        ),
        f"{digest} to be open",
    )


def test_it_serves_with_a_lease_and_a_key_and_without_rays_variables(serve_is, monkeypatch) -> None:
    serve_is(SERVER)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_JOB_ID", "1")
    made = actor()
    made.serve("d1", "{}", ("--pretend",))
    told = opened(made, "d1")
    folder = Path(told.folder)
    words = until(lambda: (folder / "words").exists() and (folder / "words").read_text(), "words")
    assert f"serve --plan {folder}/plan-d1.json --host 127.0.0.1 --port 0" in words
    assert f"--front-key-file {folder}/key --lease {folder}/lease --pretend" in words
    assert told.key == (folder / "key").read_text().strip()
    assert told.key not in words
    environ = dict(line.partition("=")[::2] for line in (folder / "env").read_text().splitlines())
    assert environ["RAY_ADDRESS"] == "local"
    assert "RAY_JOB_ID" not in environ
    assert (folder / "lease").exists()
    assert os.getsid(told.pid) != os.getsid(0)
    made.end()
    until(lambda: made.tell().state == "idle", "the end")
    assert not start_time(told.pid)


def test_a_server_has_no_lower_priority_than_ray_itself(monkeypatch, tmp_path) -> None:
    """Where the user may not raise it, it stays as Ray's workers have it."""
    asked = []

    def refused(*given: int) -> None:
        asked.append(given)
        raise PermissionError

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "setpriority", refused)
    assert actor().tell().state == "idle"
    assert asked == [(os.PRIO_PROCESS, 0, 0)]
    ACTORS.pop()._gone.set()


def test_the_next_actor_adopts_what_lives_and_ends_what_is_another_plan(serve_is) -> None:
    serve_is(SERVER)
    first = actor()
    first.serve("d1", "{}", ())
    told = opened(first, "d1")
    first._gone.set()  # it dies
    second = actor()
    adopted = opened(second, "d1")
    assert (adopted.pid, adopted.key, adopted.url) == (told.pid, told.key, told.url)
    second.serve("d2", "{}", ())
    assert opened(second, "d2").pid != told.pid
    assert not start_time(told.pid)


def test_a_killed_server_starts_again_and_a_few_times_only(serve_is) -> None:
    serve_is(SERVER)
    made = actor()
    made.serve("d1", "{}", ())
    before = opened(made, "d1").pid
    for _ in range(2):
        os.kill(before, signal.SIGKILL)
        before = until(
            lambda before=before: made.tell().state == "open" and made.tell().pid != before
            and made.tell().pid, "another one",
        )  # fmt: skip
    os.kill(before, signal.SIGKILL)
    until(lambda: made.tell().state == "unfit", "it to be given up")


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (6, 1), (3, 1)])
def test_what_would_fail_again_is_unfit_with_its_error(serve_is, code: int, starts: int) -> None:
    serve_is(f'echo x >> starts; echo "error: no room" >&2; echo "hint: buy" >&2; exit {code}')
    made = actor()
    made.serve("d1", "{}", ())
    told = until(lambda: made.tell() if made.tell().state == "unfit" else None, "it to be unfit")
    assert (told.why, told.exit_code) == ("no room", code)
    assert (Path(told.folder) / "starts").read_text() == "x\n" * starts


def test_a_new_run_ends_what_an_old_one_has_left(serve_is, monkeypatch) -> None:
    serve_is(SERVER)
    old = actor("old")
    old.serve("d1", "{}", ())
    told = opened(old, "d1")
    old._gone.set()
    monkeypatch.setattr(module, "_BACK_SECONDS", 0.2)
    monkeypatch.setattr(module, "measure_here", lambda pretend: b"{}")
    monkeypatch.setattr(ray_adapter, "gpus_of_this_task", lambda: ["0"])
    assert actor("new").measure(False) == (b"{}", ["0"])
    assert not start_time(told.pid)


def test_a_server_whose_actor_dies_at_its_start_is_known_to_the_next(serve_is) -> None:
    """Its process is written down before it begins, whoever is killed meanwhile."""
    serve_is(f"sleep 0.3; {SERVER}")
    first = actor()
    first.serve("d1", "{}", ())
    pid = until(lambda: first.tell().pid, "its process")
    first._gone.set()
    between = first._child
    between.kill()  # the shell, which a worker of Ray takes with it
    between.wait()
    second = actor()
    assert opened(second, "d1").pid == pid
    second.end()
    until(lambda: second.tell().state == "idle", "the end")
    assert not start_time(pid)


def test_an_actor_that_dies_while_it_starts_a_server_leaves_it_to_the_next(serve_is) -> None:
    """The lock is the server's before anybody has written down which process it is."""
    serve_is(f"echo x >> starts; sleep 0.3; {SERVER}")
    first = actor()
    first.serve("d1", "{}", ())
    folder = Path(first.tell().folder)
    until((folder / "starts").exists, "the start")
    first._gone.set()
    pid = until(lambda: (folder / "pid").exists() and (folder / "pid").read_text(), "its process")
    (folder / "pid").unlink()
    second = actor()
    time.sleep(0.1)
    (folder / "pid").write_text(pid)
    assert str(opened(second, "d1").pid) == pid.split()[0]
    assert (folder / "starts").read_text() == "x\n"


def test_a_run_whose_actor_lives_is_no_old_one(serve_is, monkeypatch) -> None:
    serve_is(SERVER)
    monkeypatch.setattr(module, "measure_here", lambda pretend: b"{}")
    monkeypatch.setattr(ray_adapter, "gpus_of_this_task", list)
    other = actor("other")
    other.serve("d1", "{}", ())
    told = opened(other, "d1")
    actor("new").measure(False)
    assert start_time(told.pid)


def test_what_an_ended_run_has_left_is_removed_after_a_week(serve_is, monkeypatch) -> None:
    monkeypatch.setattr(module, "measure_here", lambda pretend: b"{}")
    monkeypatch.setattr(ray_adapter, "gpus_of_this_task", list)
    made = actor("new")
    for name, days in (("old", 8), ("last", 6)):
        folder = Path(made.tell().folder).with_name(f"{name}-bb")
        folder.mkdir()
        (folder / "key").write_text("k")
        (folder / "lease").touch()
        then = time.time() - days * 86400
        os.utime(folder / "lease", (then, then))
    made.measure(False)
    kept = {folder.name.partition("-")[0] for folder in Path(made.tell().folder).parent.iterdir()}
    assert kept == {"new", "last"}
