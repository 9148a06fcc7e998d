"""The file of who is refused, and who writes it at the same time."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.gateway import plan_for
from turbofit.core.process import files
from turbofit.gateway.routing import deny_file
from turbofit.gateway.routing.deny_file import (
    DAY_SECONDS,
    DenyFile,
    deny_path,
    fingerprint,
)

pytestmark = pytest.mark.usefixtures("state")


def path_of(version: str = "0.18.0", **facts: bool) -> Path:
    return Path(deny_path(plan_for(), version, **facts) or "")


def test_a_model_s_file_is_the_same_wherever_its_checkpoint_is_now() -> None:
    plan = plan_for()

    def path(**changes: Any) -> str | None:
        source = replace(plan.model.source, **changes)
        return deny_path(replace(plan, model=replace(plan.model, source=source)), "0.18.0")

    assert path(checkpoint="/runs/1/model/InternVL2") == path(checkpoint="/cache/abc") == path()
    assert path(kind="hub_cache", where="/cache/abc", checkpoint="/cache/abc") == path()
    mine = path(kind="folder", where="/mine", checkpoint="/mine")
    assert mine == path(kind="folder", where="/mine", checkpoint="/runs/1/model/mine") != path()
    assert mine != path(kind="folder", where="/other")


def written(file: DenyFile) -> bool:
    return asyncio.run(file.write())


def refusing(*names: str) -> DenyFile:
    file = DenyFile(path_of())
    for name in names:
        file.deny(name, 2, DAY_SECONDS, client=False)
    assert written(file)
    return file


def kept() -> list[str]:
    """Whom the file refuses."""
    return sorted(DenyFile(path_of()).denied)


def test_key_and_file_are_made_once_and_only_their_user_reads_them(state: Path) -> None:
    key = DenyFile(path_of()).key
    assert (len(key), DenyFile(path_of()).key) == (32, key)
    refusing("a")
    for path in (state / "denied" / "key", path_of()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    denied = DenyFile(path_of()).of("a")
    assert denied is not None
    assert (denied.deaths, denied.seconds_left) == (2, pytest.approx(DAY_SECONDS, abs=60))


def test_without_a_folder_the_key_is_this_process_s_alone(tmp_path, monkeypatch) -> None:
    path, file = path_of(), tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(file))
    assert DenyFile(path).key != DenyFile(path).key
    assert deny_path(plan_for(), "0.18.0") is None
    # A folder that cannot be written costs no answer either.
    unwritable = DenyFile(file / "folder.json")
    unwritable.deny("a", 2, DAY_SECONDS, client=False)
    assert not written(unwritable)
    assert (set(unwritable.unwritten), unwritable.of("a") is not None) == ({"a"}, True)


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema":"other/1"}', b'{"denied":[1]}'])
def test_a_damaged_file_is_put_aside(content: bytes) -> None:
    path_of().write_bytes(content)
    file = DenyFile(path_of())
    path_of().write_bytes(content)
    assert DenyFile(path_of()).denied == file.denied == {}
    assert path_of().with_suffix(".damaged").read_bytes() == content
    assert refusing("a").of("a") is not None


def test_two_gateways_write_one_file_and_lose_nothing() -> None:
    first, two = DenyFile(path_of()), DenyFile(path_of())
    first.deny("a", 2, DAY_SECONDS, client=False)
    two.deny("b", 2, DAY_SECONDS, client=True)
    assert [written(file) for file in (first, two)] == [True, True]
    assert kept() == ["a", "b"]
    assert two.number == (1, 1)


def test_a_file_that_a_person_removes_lets_in_whom_a_running_gateway_refuses() -> None:
    file = refusing("a")
    assert file.look_again() == ()
    path_of().unlink()
    assert file.look_again() == ("a",)
    assert file.of("a") is None
    file.deny("d", 2, DAY_SECONDS, client=False)
    assert written(file)
    assert kept() == ["d"]


def test_the_file_is_of_one_model_and_engine_is_bounded_and_the_oldest_go() -> None:
    assert len({path_of(), path_of(), path_of("0.19.0"), path_of(pretend=True)}) == 3
    file = refusing(*(str(number) for number in range(1100)))
    assert len(kept()) == 1024
    assert file.of("0") is None


def test_a_clock_that_is_set_back_refuses_nobody_for_longer(monkeypatch) -> None:
    file, now = refusing("a"), [time.time() - 90_000]
    began = now[0] + 90_000
    monkeypatch.setattr(time, "time", lambda: now[0])
    denied = file.of("a")
    assert denied is not None
    assert denied.seconds_left <= DAY_SECONDS
    now[0] = began + 90_000
    assert file.of("a") is None


def test_who_was_let_in_beside_a_full_disk_stays_let_in(monkeypatch) -> None:
    file = refusing("a", "b")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(deny_file, "write_atomic", full)
        file.pardon("a")
        assert not written(file)
    refusing("c")  # another gateway writes the file, with "a" in it
    file.look_again()
    assert sorted(file.denied) == ["b", "c"]
    assert written(file)
    assert kept() == ["b", "c"]


def test_a_lock_that_somebody_keeps_is_waited_for_briefly_and_nothing_is_lost(monkeypatch) -> None:
    """A process that was stopped in the middle of a write keeps it for good."""
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.01)
    file = refusing("a")
    descriptor = os.open(path_of().with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    file.deny("b", 2, DAY_SECONDS, client=False)
    assert not written(file)
    with monkeypatch.context() as patch:
        patch.setattr(files, "time", None)  # the gateway's loop waits for nobody
        file.pardon("a")
    os.close(descriptor)
    assert written(file)
    assert kept() == ["b"]


@pytest.mark.parametrize("size", [10, 1 << 20])
async def test_a_fingerprint_is_keyed_and_of_all_that_the_engine_is_given(size: int) -> None:
    body, other = b"x" * size, b"x" * (size - 1) + b"y"
    given = [(b"k", "/a", body), (b"l", "/a", body), (b"k", "/b", body), (b"k", "/a", other)]
    digests = [await fingerprint(*inputs) for inputs in (*given, given[0])]
    assert (len(set(digests)), digests[0]) == (4, digests[-1])
    assert len(digests[0]) == 24
