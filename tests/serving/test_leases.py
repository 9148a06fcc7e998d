"""Two turbofits never count the same memory; what dead ones left is ignored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.support.nvml import Scenario, gpu_3090
from tests.support.plans import gpu, machine, plausible_plan
from tests.support.processes import REPO
from turbofit.core.errors import LaunchError
from turbofit.core.machine import Holder
from turbofit.core.process import files
from turbofit.core.process.files import state_dir
from turbofit.core.process.processes import start_time
from turbofit.core.units import GIB, MIB
from turbofit.serving.leases import Leases, _with_reserved, counted, end_orphans
from turbofit.serving.process.child import group_of, members
from turbofit.serving.runs import Record

pytestmark = pytest.mark.slow

#: Plans and reserves as `serve` does, says so, and keeps its lease until its stdin closes.
PLANS = """
import json, sys
from turbofit.serving.leases import Leases
from turbofit.serving.planner import Planner
from turbofit.planning.request import PlanRequest
from turbofit.planning import choose
choose.limit_costs = lambda *_: ()  # half of a plan's time, which nobody reads here
with Leases() as leases:
    request = PlanRequest(model=sys.argv[1], **json.loads(sys.argv[2]))
    plan = Planner(request, leases, lambda _: None, rehearse=False).make({})
    (gpu,) = plan.ledgers
    need = max(gpu.peak, gpu.load_peak) - gpu.used
    print(json.dumps([plan.fits, plan.verdict, need, gpu.free]), flush=True)
    sys.stdin.read()
"""
UUID = gpu(0).uuid


def reserved(folder: Path) -> Leases:
    leases = Leases(folder)
    leases.reserve(plausible_plan(gpus=1, tp=1))
    return leases


def reserved_of(card: Any, leases: Leases) -> int:
    """What leases take of a card's free memory."""
    one = msgspec.structs.replace(machine(1), gpus=(card,))
    return card.free - counted(one, leases).gpus[0].free


def card_of(held: int, *pids: int) -> Any:
    holders = tuple(Holder(pid=pid, name="python", bytes=held) for pid in pids)
    return gpu(0, used=300 * MIB + held, free=23968 * MIB - held, holders=holders)


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
        ledger = plausible_plan(gpus=1, tp=1).ledgers[0]
        need = max(ledger.peak, ledger.load_peak) - ledger.used + ledger.margin
        assert lease.need == {UUID: need}
        seen, before = counted(machine(1), yours).gpus[0], machine(1).gpus[0]
        assert seen.free == max(0, before.free - need)
        assert seen.used + seen.free == before.used + before.free
        assert seen.holders[-1].pid == os.getpid()
        pretend = replace(before, uuid="preset-0")
        seen = _with_reserved(pretend, [replace(lease, need={"preset-0": need})], {})
        assert "another --on SPEC is another machine" in seen.holders[-1].name
        assert counted(machine(1), mine) == machine(1)
        child = os.fork()  # which leaves it alone
        if not child:
            mine.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert [lease.pid for lease in yours.others()] == [os.getpid()]
    with Leases(tmp_path) as later:
        assert later.others() == later.stale() == []


@pytest.mark.usefixtures("state")
def test_turbofit_stop_is_named_where_it_ends_the_owner(tmp_path: Path) -> None:
    """Pipelines, trials, other users and other containers hold leases that no `stop` finds."""
    with reserved(tmp_path), Leases(tmp_path) as yours:

        def names_stop() -> bool:
            (*_, holder) = counted(machine(1), yours).gpus[0].holders
            return "turbofit stop 20260101-000000-M " in holder.name

        assert not names_stop()
        record = Record(state_dir("runs") / "20260101-000000-M", model="M", command="tune")
        record.folder.mkdir()
        record.change()
        assert not names_stop()
        record.change(command="serve")
        assert names_stop()
        (lease,) = yours.others()
        elsewhere = replace(lease, pid_namespace="of another container")
        seen = _with_reserved(machine(1).gpus[0], [elsewhere], {lease.pid: "run"})
        assert "turbofit stop" not in seen.holders[-1].name


def test_what_its_engines_already_hold_is_not_counted_twice(tmp_path: Path, engine: Any) -> None:
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        (lease,) = yours.others()
        held = 5 * GIB
        # Nobody is seen on the card (a container): whole until it is ready, then its growth.
        card, hidden = card_of(held, engine.pid), card_of(held)
        mine.note([engine.pid], ready=False)
        assert reserved_of(card, yours) == min(card.free, lease.need[UUID] - held)
        assert reserved_of(hidden, yours) == min(card.free, lease.need[UUID])
        mine.note([engine.pid], ready=True)
        assert reserved_of(hidden, yours) == lease.growth[UUID]
        # LMDeploy's cache is a share of what is free: more was than the plan had counted on.
        mine.note([engine.pid], ready=True, larger=True)
        full = card_of(lease.need[UUID] + GIB, engine.pid)
        assert reserved_of(full, yours) == min(full.free, lease.growth[UUID])
        # Its turbofit has not looked yet, and will start it again on the same memory.
        (lease,) = yours.others()
        assert lease.settled
        engine.kill()
        engine.communicate()
        assert not lease.settled
        empty = card_of(0)
        assert reserved_of(empty, yours) == min(empty.free, lease.need[UUID])
        elsewhere = msgspec.structs.replace(lease, pid_namespace="pid:[1]")
        assert elsewhere.settled, "what runs in another container is not seen"
        mine.note([engine.pid], ready=True)
        assert not yours.others()[0].settled


def test_the_lock_waits_and_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as two, one.locked():
        slept: list[float] = []
        clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
        monkeypatch.setattr(files, "time", clock)
        told: list[int] = []
        with pytest.raises(LaunchError, match="five minutes"), two.locked(lambda: told.append(1)):
            pass
        assert told == [1]
        assert sum(slept) >= 300
        monkeypatch.undo()
    with Leases(tmp_path) as three, three.locked():
        pass


def test_a_folder_that_is_none_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "trap").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("trap", "link"):
        with pytest.raises(LaunchError, match="is no folder"):
            Leases(tmp_path / name)
    alone = Leases(Path("/proc/turbofit"))
    assert alone.alone is not None
    with alone.locked():
        alone.reserve(plausible_plan())
    assert alone.others() == []
    (tmp_path / "lock").symlink_to("nowhere")
    refused = pytest.raises(LaunchError, match="cannot be opened")
    with Leases(tmp_path) as leases, refused as caught, leases.locked():
        pass
    assert "TURBOFIT_LEASES" in caught.value.hint


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


def test_what_anybody_writes_into_a_lease_gives_no_memory(tmp_path: Path) -> None:
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
        for need, free in ((-(8 << 30), None), (1 << 80, None), ((1 << 62) - 1, 0)):
            document = {**json.loads(written.read_text()), "need": {UUID: need}}
            written.write_text(json.dumps(document))
            seen = counted(machine(1), yours)
            assert seen == machine(1) if free is None else seen.gpus[0].free == free
            msgspec.json.encode(seen)


@pytest.mark.parametrize("whose", ["another boot", "another user"])
def test_only_engines_of_our_user_and_boot_are_ended(tmp_path, whose: str, engine: Any) -> None:
    if whose == "another user" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    with reserved(tmp_path) as mine, Leases(tmp_path) as yours:
        mine.note([engine.pid], ready=True)
        text = next(tmp_path.glob("*.json")).read_text()
        left = tmp_path / "left.json"
        left.write_text(text if whose == "another user" else text.replace("pid:[", "pid:[1"))
        if whose == "another user":
            os.chown(left, 12345, 12345)
        assert end_orphans(yours) == []
        assert left.exists()
        assert engine.poll() is None


def test_a_killed_owner_is_stale_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.serving.test_leases import reserved\n"
        "leases = reserved(Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as child, Leases(tmp_path) as leases:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert len(leases.others()) == 1
        child.kill()
        child.wait()
        assert leases.others() == []
        assert len(leases.stale()) == 1
        assert end_orphans(leases) == []
        assert list(tmp_path.glob("*.json")) == []


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
    """Start turbofits that plan at the same moment on one card, and read their answers."""
    started: list[subprocess.Popen[str]] = []
    environ = {**os.environ, **nvml_machine(Scenario(gpus=[gpu_3090(0)])), "PYTHONPATH": str(REPO),
               "TURBOFIT_LEASES": str(tmp_path / "leases")}  # fmt: skip

    def run(*models: str, **keywords: Any) -> list[list[Any]]:
        begun = [
            subprocess.Popen(
                [sys.executable, "-c", PLANS, model, json.dumps(keywords)], env=environ,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for model in models
        ]  # fmt: skip
        started.extend(begun)
        return [json.loads(child.stdout.readline()) for child in begun]

    yield run
    for child in started:
        child.kill()
        child.communicate()


def test_many_turbofits_at_once_share_one_card(planning) -> None:
    found = planning(*["internvl2-1b"] * 4, budget=8 * GIB)
    taken = [(need, free) for fits, _, need, free in found if fits]
    assert 2 <= len(taken) < 4
    assert sum(need for need, _ in taken) <= max(free for *_, free in found)
    # Each saw what those before it had reserved.
    assert len({free for _, free in taken}) == len(taken)
