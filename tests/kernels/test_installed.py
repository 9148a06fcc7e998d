"""The census of the engine that is installed, and of released wheels."""

from __future__ import annotations

import base64
import errno
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.kernels.device_code import CODE, cubin, fatbin, library
from turbofit.core.errors import UsageError
from turbofit.core.process.state import state_dir
from turbofit.kernels import installed as module
from turbofit.kernels.census import Count
from turbofit.kernels.families import experts, gemm
from turbofit.kernels.installed import (
    census_of,
    installed,
    turbomind_library,
)
from turbofit.kernels.released import Version, is_released, released

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


def test_a_library_of_ones_own_is_read_once(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install()
    assert turbomind_library() == path
    found = installed()
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


def test_a_state_folder_that_cannot_be_written_costs_only_the_kept_file(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install()

    def full(*_: object, **__: object) -> None:
        raise UsageError("no space", hint="none")

    monkeypatch.setattr(module, "write_atomic", full)
    assert census_of(path).families == {"routing of experts": {"80": Count(code=1)}}
    assert not list(state_dir("kernels").iterdir())


@pytest.mark.parametrize("broken", ["another turbofit's", "unreadable"])
def test_a_kept_census_that_is_of_no_use_is_taken_anew(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = install()
    found = census_of(path)
    next(state_dir("kernels").iterdir()).write_text("{}")
    if broken == "unreadable":
        error = OSError(errno.EIO, "Input/output error")
        monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=error))
    assert census_of(path) == found


def test_the_reference_has_no_int4_for_blackwell() -> None:
    """The figures of shared knowledge: 80 int4 kernels, all empty on sm_120, and none for rows."""
    census = released((0, 18, 0))
    names = [gemm("int4", "float16"), experts("int4", "float16")]
    assert census.count(names, "86") == Count(code=80)
    assert census.count(names, "120a") == Count(empty=80)
    assert census.count([experts("float16", "float16")], "90a") == Count()


@pytest.mark.parametrize("version", [(0, 6, 0), (0, 9, 1), (0, 12, 3)])
def test_no_release_before_0_13_has_code_for_blackwell(version: Version) -> None:
    census = released(version)
    assert census.architecture((12, 0)) is None
    assert census.architecture((8, 6)) == "86"


def test_releases_without_a_file_of_their_own() -> None:
    assert released((0, 18, 9)) == released((0, 18, 0))
    assert released((1, 0, 0)) == released((0, 18, 0))
    assert released((0, 5, 3)) is None


def test_a_released_library_is_known_by_its_hash() -> None:
    assert not is_released((0, 18, 0), "x")
    assert not is_released((0, 5, 0), "x")
