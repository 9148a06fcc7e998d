"""The file of a quarantine, and who writes it at the same time."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path

import pytest

from tests.gateway.quarantine.test_suspects import Clock, accused, convict
from tests.support.gateway import plan_for
from turbofit.core.errors import UsageError
from turbofit.core.process import locks
from turbofit.gateway.quarantine.fingerprints import KEY_BYTES
from turbofit.gateway.quarantine.quarantine_file import (
    QuarantineFile,
    installation_key,
    kept_time,
    pardon,
    quarantine_file,
    quarantine_path,
)
from turbofit.gateway.quarantine.quarantined import EngineDeath, Quarantined
from turbofit.gateway.quarantine.suspects import Suspects


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "turbofit" / "quarantine"


def convicted(name: str) -> Suspects:
    found = Suspects(time.time)
    convict(found, name)
    return found


def test_a_key_is_made_once_and_only_its_user_reads_it(state: Path) -> None:
    key = installation_key()
    assert (len(key), installation_key()) == (KEY_BYTES, key)
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    assert [one.name for one in state.iterdir()] == ["key"]


def test_without_a_folder_the_key_is_this_process_s_alone(tmp_path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(file))
    assert len(installation_key()) == KEY_BYTES
    assert installation_key() != installation_key()
    assert quarantine_file(plan_for(), "0.18.0") is None


def test_another_model_or_engine_begins_with_nothing() -> None:
    plan = plan_for()
    path = quarantine_path(plan, "0.18.0")
    assert path == quarantine_path(plan, "0.18.0")
    assert path != quarantine_path(plan, "0.19.0")
    assert path != quarantine_path(plan, "0.18.0", pretend=True)
    assert quarantine_file(plan, "0.18.0") == str(path)


def test_what_is_written_is_read_by_the_next_start(state: Path) -> None:
    file = QuarantineFile(quarantine_path(plan_for(), "0.18.0"))
    assert file.read() == Quarantined()
    assert file.write(convicted("a").state()) is None
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    again = Suspects(time.time, QuarantineFile(file.path).read())
    assert again.conviction("a") is not None


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema":"other/1"}', b'{"convicted":[1]}'])
def test_a_broken_file_is_an_empty_one(state: Path, content: bytes) -> None:
    path = quarantine_path(plan_for(), "0.18.0")
    path.write_bytes(content)
    file = QuarantineFile(path)
    assert file.read() == Quarantined()
    file.write(convicted("a").state())
    assert len(file.read().convicted) == 1


def test_two_gateways_keep_what_both_know(state: Path) -> None:
    path = quarantine_path(plan_for(), "0.18.0")
    one, two = QuarantineFile(path), QuarantineFile(path)
    one.read()
    two.read()
    one.write(convicted("a").state())
    others = two.write(convicted("b").state())
    assert others is not None
    assert [found.fingerprint for found in others.convicted] == ["a"]
    assert {found.fingerprint for found in one.read().convicted} == {"a", "b"}


def test_a_pardon_reaches_a_gateway_that_runs_and_stays(state: Path) -> None:
    file = QuarantineFile(quarantine_path(plan_for(), "0.18.0"))
    mine = convicted("a")
    file.write(mine.state())
    assert not file.changed
    assert (pardon("a"), pardon("b")) == (1, 0)
    assert file.changed
    file.write(mine.state())  # it has not looked yet
    assert file.read().convicted == ()
    mine.merge(file.read())
    assert mine.conviction("a") is None


def test_a_file_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    file = QuarantineFile(tmp_path / "no" / "such" / "folder.json")
    assert file.write(convicted("a").state()) is None
    assert file.unwritten


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_who_may_not_pardon_is_told(state: Path) -> None:
    file = QuarantineFile(quarantine_path(plan_for(), "0.18.0"))
    file.write(convicted("a").state())
    state.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        pardon("a")


def test_the_clock_of_what_is_merged_is_the_file_s(state: Path) -> None:
    clock = Clock()
    mine = Suspects(clock)
    mine.accuse(EngineDeath(0), accused("a"))
    path = quarantine_path(plan_for(), "0.18.0")
    one, two = QuarantineFile(path, clock), QuarantineFile(path, clock)
    two.read()
    one.write(mine.state())
    two.write(Suspects(clock).state())
    assert len(one.read().suspects) == 1


def test_a_wall_clock_that_is_set_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept_time()
    assert before == pytest.approx(time.time(), abs=60)
    monkeypatch.setattr(time, "time", lambda: before + 90_000)
    assert before <= kept_time() < before + 60


def test_a_lock_that_somebody_keeps_is_waited_for_briefly_and_nothing_is_lost(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped in the middle of a pardon keeps it for good."""
    monkeypatch.setattr(locks, "_SECONDS", 0.01)
    file = QuarantineFile(quarantine_path(plan_for(), "0.18.0"))
    descriptor = os.open(file.path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    mine = convicted("a")
    assert file.write(mine.state()) is None
    assert file.unwritten
    file.path.write_bytes(b"{}")
    with pytest.raises(UsageError, match="another process keeps its lock") as told:
        pardon("a")
    assert "turbofit watch --forget" in str(told.value.hint)
    os.close(descriptor)
    file.write(mine.state())
    assert not file.unwritten
    assert Suspects(time.time, file.read()).conviction("a") is not None


def test_a_pardon_that_is_read_while_another_thread_writes_stays(state: Path) -> None:
    """What is to be written was collected before; the gateway's loop reads meanwhile."""
    file = QuarantineFile(quarantine_path(plan_for(), "0.18.0"))
    collected = convicted("a").state()
    file.write(collected)
    pardon("a")
    file.read()
    file.write(collected)
    assert file.read().convicted == ()


def test_two_writes_within_a_tick_of_the_file_system_s_clock_differ(state: Path) -> None:
    file = QuarantineFile(quarantine_path(plan_for(), "0.18.0"))
    file.write(convicted("a").state())
    at = file.path.stat().st_mtime_ns
    pardon("a")
    os.utime(file.path, ns=(at, at))
    assert file.changed


def test_what_the_first_reader_has_moved_is_not_read_again_as_it_was(state: Path) -> None:
    """A gateway moves dates that are ahead of its clock, where that was set back."""
    path = quarantine_path(plan_for(), "0.18.0")
    ahead = Suspects(lambda: time.time() + 90_000)
    convict(ahead, "a")
    QuarantineFile(path).write(ahead.state())
    file = QuarantineFile(path)
    moved = file.read().none_ahead(time.time())
    assert file.write(moved) is None
    assert file.read() == moved
