from __future__ import annotations

import base64
import errno
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernels.device_code import CODE, cubin, fatbin, library
from turbofit.core.errors import UsageError
from turbofit.core.process.state import state_dir
from turbofit.kernels import installed as module
from turbofit.kernels.census import Count
from turbofit.kernels.installed import (
    census_of,
    empty_kernels_file,
    installed,
    turbomind_library,
)
from turbofit.kernels.released import released

NAME = "lmdeploy/turbomind/_turbomind.cpython-311-x86_64-linux-gnu.so"
BODY = library(fatbin([(80, cubin({"_ZN9turbomind15MoeGatherKernelEv": CODE}), 0x11)]))


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    installed.cache_clear()
    yield
    installed.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A distribution of LMDeploy, the first one on the path."""

    def make(version: str = "0.18.0", body: bytes = BODY, digest: str | None = None) -> Path:
        site = tmp_path / "site"
        info = site / f"lmdeploy-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: lmdeploy\nVersion: {version}\n"
        )
        known = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        (info / "RECORD").write_text(f"{NAME},sha256={digest or known},{len(body)}\n")
        path = site / NAME
        path.parent.mkdir(parents=True)
        path.write_bytes(body)
        monkeypatch.setattr(sys, "path", [str(site), *sys.path])
        return path

    return make


def test_the_library_is_found_by_its_record(install: Callable[..., Path]) -> None:
    path = install()
    assert turbomind_library() == path


def test_a_library_of_ones_own_is_read_once(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install()
    found = installed()
    assert found is not None
    assert found.families == {"routing of experts": {"80": Count(code=1)}}
    monkeypatch.setattr(module, "take_census", lambda library: pytest.fail("read again"))
    assert census_of(path) == found
    assert len(list(state_dir("kernels").iterdir())) == 1


def test_a_released_library_is_not_read(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash in RECORD is the wheel's."""
    install(digest="XDy6RN7tcW9b4a6EhZkv1mC43Ipd9Na_LCsn4aRh6qM")
    monkeypatch.setattr(module, "take_census", lambda library: pytest.fail("read"))
    assert installed() == released((0, 18, 0))


def test_what_cannot_be_read_counts_as_the_release(install: Callable[..., Path]) -> None:
    install("0.16.0", body=b"no library at all, but long enough" * 10)
    assert installed() == released((0, 16, 0))


def test_a_kept_census_of_another_turbofit_is_taken_anew(install: Callable[..., Path]) -> None:
    path = install()
    found = census_of(path)
    kept = next(state_dir("kernels").iterdir())
    kept.write_text("{}")
    assert census_of(path) == found


def test_a_state_folder_that_cannot_be_written_costs_only_the_kept_file(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install()
    assert empty_kernels_file((8, 9)) is not None

    def full(*_: object, **__: object) -> None:
        raise UsageError("no space", hint="none")

    monkeypatch.setattr(module, "write_atomic", full)
    assert census_of(path).families == {"routing of experts": {"80": Count(code=1)}}
    assert empty_kernels_file((8, 6)) is None


def test_a_kept_census_that_cannot_be_read_is_taken_anew(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install()
    found = census_of(path)

    def broken(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    assert census_of(path) == found
