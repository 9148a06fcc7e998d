"""Two turbofits never count the same memory; what dead ones left is ignored."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.support.nvml import Scenario, gpu_3090
from tests.support.plans import gpu, machine, plausible_plan
from tests.support.processes import REPO
from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.machine import Holder
from turbofit.core.process import files
from turbofit.core.units import GIB, MIB
from turbofit.launch.engine.kernel import group_of, members, start_time
from turbofit.launch.serve import leases as module
from turbofit.launch.serve.leases import Leases, counted, end_orphans

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("plan_driver.py")
UUID = gpu(0).uuid


def reserved(folder: Path, gpus: int = 1) -> Leases:
    leases = Leases(folder)
    leases.reserve(plausible_plan(gpus=gpus, tp=1))
    return leases


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a session of its own, which does nothing."""
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    yield child
    child.kill()
    child.communicate()


def test_a_lease_counts_for_others_and_not_for_its_owner(tmp_path: Path) -> None:
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        assert mine.others() == []
        (lease,) = yours.others()
        assert lease.pid == os.getpid()
        ledger = plausible_plan(gpus=1, tp=1).gpus[0]
        need = max(ledger.peak, ledger.load_peak) - ledger.used + ledger.margin
        assert lease.need == {UUID: need}
        seen = counted(machine(1), yours).gpus[0]
        before = machine(1).gpus[0]
        assert seen.free == max(0, before.free - need)
        assert seen.used + seen.free == before.used + before.free
        assert seen.holders[-1].pid == os.getpid()
        assert "reserved" in seen.holders[-1].name
        assert counted(machine(1), mine) == machine(1)
    with Leases(tmp_path) as later:
        assert later.others() == []
        assert later.stale() == []


def test_a_fork_of_its_owner_leaves_it_alone(tmp_path: Path) -> None:
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        child = os.fork()
        if not child:
            mine.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert [lease.pid for lease in yours.others()] == [os.getpid()]


def test_what_its_engines_already_hold_is_not_counted_twice(tmp_path: Path, engine: Any) -> None:
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        (lease,) = yours.others()
        mine.note(model="m", engines=[engine.pid], ready=False)
        held = 5 * GIB
        card = gpu(
            0, used=300 * MIB + held, free=23968 * MIB - held,
            holders=(Holder(pid=engine.pid, name="python", bytes=held),),
        )  # fmt: skip
        one = msgspec.structs.replace(machine(1), gpus=(card,))
        seen = counted(one, yours).gpus[0]
        assert card.free - seen.free == min(card.free, lease.need[UUID] - held)
        # Nobody is seen on the card (a container): whole until it is ready, then its growth.
        hidden = msgspec.structs.replace(one, gpus=(msgspec.structs.replace(card, holders=()),))
        whole = counted(hidden, yours).gpus[0]
        assert card.free - whole.free == min(card.free, lease.need[UUID])
        mine.note(model="m", engines=[engine.pid], ready=True)
        rest = counted(hidden, yours).gpus[0]
        assert card.free - rest.free == lease.growth[UUID]


def test_an_engine_that_ended_a_moment_ago_is_counted_whole(tmp_path: Path, engine: Any) -> None:
    """Its turbofit has not looked yet, and will start it again on the same memory."""
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        mine.note(model="m", engines=[engine.pid], ready=True)
        (lease,) = yours.others()
        assert lease.settled
        engine.kill()
        engine.communicate()
        assert not lease.settled
        card = machine(1).gpus[0]
        assert isinstance(card.free, int)
        seen = counted(machine(1), yours).gpus[0]
        assert card.free - seen.free == min(card.free, lease.need[UUID])
        elsewhere = msgspec.structs.replace(lease, pid_namespace="pid:[1]")
        assert elsewhere.settled, "what runs in another container is not seen"


def test_a_cache_that_may_be_larger_than_its_plan_leaves_its_growth_reserved(
    tmp_path: Path, engine: Any
) -> None:
    """LMDeploy's cache is a share of what is free: more was than the plan had counted on."""
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        mine.note(model="m", engines=[engine.pid], ready=True, larger=True)
        (lease,) = yours.others()
        held = lease.need[UUID] + GIB
        holder = Holder(pid=engine.pid, name="python", bytes=held)
        card = gpu(0, used=held, free=24 * GIB - held, holders=(holder,))
        one = msgspec.structs.replace(machine(1), gpus=(card,))
        assert card.free - counted(one, yours).gpus[0].free == min(card.free, lease.growth[UUID])


def test_a_lock_that_somebody_keeps_costs_a_lease_only_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process looks at the lock of a new lease, and is stopped in the middle of it."""
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.01)
    create, looking = module._create, []

    def watched(path: Path) -> int:
        descriptor = create(path)
        looking.append(os.open(path, os.O_RDONLY))
        fcntl.flock(looking[-1], fcntl.LOCK_EX)
        return descriptor

    monkeypatch.setattr(module, "_create", watched)
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        assert mine.unwritten
        assert [path for path in tmp_path.iterdir() if path.name != ".lock"] == []
        monkeypatch.setattr(module, "_create", create)
        mine.note(model="m", engines=[os.getpid()], ready=True)
        assert not mine.unwritten
        assert len(yours.others()) == 1
    for descriptor in looking:
        os.close(descriptor)


def test_a_file_system_without_locks_costs_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        assert not mine.unwritten
        assert len(yours.others()) == 1


def test_a_disk_that_was_full_for_a_while_costs_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written is noted again, and the leases of others are seen all along."""
    full = UsageError("disk full", hint="")

    def refuse(*_: object, **__: object) -> None:
        raise full

    with reserved(tmp_path) as mine, reserved(tmp_path) as yours:
        monkeypatch.setattr(module, "write_atomic", refuse)
        mine.note(model="m", engines=[os.getpid()], ready=True)
        assert mine.unwritten
        assert mine.alone is None
        assert len(mine.others()) == 1
        monkeypatch.undo()
        mine.note(model="m", engines=[os.getpid()], ready=True)
        assert not mine.unwritten
        (lease,) = yours.others()
        assert [pid for pid, _ in lease.engines] == [os.getpid()]


def test_the_lock_waits_and_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as two, one.locked():
        slept: list[float] = []
        clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
        monkeypatch.setattr(module, "time", clock)
        told: list[int] = []
        with pytest.raises(LaunchError, match="five minutes"), two.locked(lambda: told.append(1)):
            pass
        assert told == [1]
        assert sum(slept) > 300
        monkeypatch.undo()
    with Leases(tmp_path) as three, three.locked():
        pass


def test_a_folder_that_is_none_or_cannot_be_written(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.write_text("")
    with pytest.raises(LaunchError, match="is no folder"):
        Leases(trap)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(LaunchError, match="is no folder"):
        Leases(link)
    alone = Leases(Path("/proc/turbofit"))
    assert alone.alone is not None
    with alone.locked():
        alone.reserve(plausible_plan())
    assert alone.others() == []


def test_broken_leases_are_no_leases(tmp_path: Path) -> None:
    wrong = ('"need": 3', '"engines": [[1]]', f'"need": {{"{UUID}": -1}}', '"engines": [[1, 1]]')
    texts = [f'{{"schema": "turbofit.lease/1", {field}}}' for field in wrong]
    for number, text in enumerate(("", "{", "[]", '"x"', "{}", *texts)):
        (tmp_path / f"{number}.json").write_text(text)
        (tmp_path / f"{number}.lock").write_text("")
    (tmp_path / "x.json").write_bytes(b'{"schema": "turbofit.lease/1", "model": "\xff"}')
    with Leases(tmp_path) as leases:
        assert leases.others() == []
        assert counted(machine(1), leases) == machine(1)
        assert end_orphans(leases) == []


def test_every_user_reads_a_lease_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with reserved(tmp_path) as mine, mine.locked():
            modes = {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {".json": 0o644, ".lock": 0o644, "": 0o644}


def test_a_lock_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("nowhere")
    with (
        Leases(tmp_path) as leases,
        pytest.raises(LaunchError, match="cannot be opened") as caught,
        leases.locked(),
    ):
        pass
    assert "TURBOFIT_LEASES" in caught.value.hint


def foreign(folder: Path, **facts: Any) -> Path:
    """A lease as its living owner, who has it locked, wrote it; changed."""
    path = next(folder.glob("*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return path


def test_what_anybody_writes_into_a_lease_gives_no_memory(tmp_path: Path) -> None:
    with reserved(tmp_path), Leases(tmp_path) as yours:
        for need in (-(8 << 30), 1 << 80):
            foreign(tmp_path, need={UUID: need})
            assert counted(machine(1), yours) == machine(1)
        foreign(tmp_path, need={UUID: (1 << 62) - 1})
        seen = counted(machine(1), yours)
        assert seen.gpus[0].free == 0
        msgspec.json.encode(seen)


def test_nobody_makes_others_wait_for_a_lease(tmp_path: Path) -> None:
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        written = next(tmp_path.glob("*.json"))
        os.mkfifo(tmp_path / "pipe.json")
        (tmp_path / "link.json").symlink_to(written)
        os.link(written, tmp_path / "second.json")
        with (tmp_path / "endless.json").open("wb") as file:
            file.truncate(1 << 40)
        assert yours.stale() == []
        assert [lease.pid for lease in yours.others()] == [os.getpid()]
        assert mine.others() == []


@pytest.mark.parametrize("whose", ["another boot", "another user"])
def test_only_engines_of_our_user_and_boot_are_ended(
    tmp_path: Path, whose: str, engine: Any
) -> None:
    if whose == "another user" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        mine.note(model="m", engines=[engine.pid], ready=True)
        path = next(tmp_path.glob("*.json"))
        left = tmp_path / "left.json"
        left.write_text(path.read_text())
        if whose == "another user":
            os.chown(left, 12345, 12345)
        else:
            left.write_text(path.read_text().replace("pid:[", "pid:[1"))
        assert end_orphans(yours) == []
        assert left.exists()
        assert engine.poll() is None


def test_a_killed_owner_is_stale_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.support.plans import plausible_plan\n"
        "from turbofit.launch.serve.leases import Leases\n"
        "leases = Leases(Path(sys.argv[1]))\n"
        "leases.reserve(plausible_plan(gpus=1, tp=1))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with Leases(tmp_path) as leases:
        assert len(leases.others()) == 1
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert leases.others() == []
        assert len(leases.stale()) == 1
        assert end_orphans(leases) == []
        assert list(tmp_path.glob("*.json")) == []
    child.stdin.close()
    child.stdout.close()


def test_groups_are_told_by_when_their_leader_began(engine: Any) -> None:
    began = start_time(engine.pid)
    assert began > 0
    assert group_of(engine.pid) == engine.pid
    assert members(engine.pid, began) == [engine.pid]
    # The same number with another start is somebody else.
    assert members(engine.pid, began - 1) == []
    engine.kill()
    engine.communicate()
    assert start_time(engine.pid) == 0
    assert members(engine.pid, began) == []


@pytest.fixture
def planning(tmp_path: Path, nvml_machine: Any):
    """Start turbofits that plan at the same moment on one card."""
    started: list[subprocess.Popen[str]] = []
    scenario = Scenario(gpus=[gpu_3090(0)])
    environ = {**os.environ, **nvml_machine(scenario), "PYTHONPATH": str(REPO),
               "TURBOFIT_LEASES": str(tmp_path / "leases")}  # fmt: skip

    def run(model: str, **keywords: Any) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, str(DRIVER), model, json.dumps(keywords)], env=environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(child)
        return child

    yield run
    for child in started:
        child.kill()
        child.communicate()


def answers(children: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    found = []
    for child in children:
        assert child.stdout is not None
        found.append(json.loads(child.stdout.readline()))
    return found


def test_many_turbofits_at_once_share_one_card(planning) -> None:
    children = [planning("internvl2-1b", budget=8 * GIB) for _ in range(4)]
    found = answers(children)
    fit = [one for one in found if one["fits"]]
    need = sum(next(iter(one["gpus"].values()))["need"] for one in fit)
    usable = max(next(iter(one["gpus"].values()))["free"] for one in found)
    assert 2 <= len(fit) < 4
    assert need <= usable
    # Each saw what those before it had reserved.
    free = sorted((next(iter(one["gpus"].values()))["free"] for one in fit), reverse=True)
    assert len(set(free)) == len(fit)


def test_the_second_takes_what_the_first_leaves(planning) -> None:
    (first,) = answers([planning("internvl2-1b")])
    (second,) = answers([planning("internvl2-8b")])
    assert first["fits"]
    assert not second["fits"]
    assert "does not fit" in second["verdict"]


def test_when_the_first_is_killed_the_second_has_it_all(planning) -> None:
    child = planning("internvl2-8b")
    (first,) = answers([child])
    child.send_signal(signal.SIGKILL)
    child.wait()
    (second,) = answers([planning("internvl2-8b")])
    assert second["fits"]
    assert second["gpus"] == first["gpus"]
