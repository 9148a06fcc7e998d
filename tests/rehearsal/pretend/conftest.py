from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.rehearsal.pretend.child import Machine, Pretend, make, run
from turbofit.rehearsal.pretend.build import build
from turbofit.rehearsal.pretend.scenario import Scenario

MachineOf = Callable[[Scenario], Machine]


@pytest.fixture(scope="session")
def libraries() -> Path:
    """The pretend libraries, which all tests share; a changed source builds others."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    return build()


@pytest.fixture
def pretend(libraries: Path, tmp_path: Path) -> Pretend:
    """Runs code on a pretend machine of one card, or of a scenario."""
    return partial(run, libraries, tmp_path)


@pytest.fixture
def machine_of(libraries: Path, tmp_path: Path) -> MachineOf:
    """A scenario for several processes."""
    return partial(make, libraries, tmp_path)


@pytest.fixture
def machine(libraries: Path, tmp_path: Path) -> Machine:
    """One card for several processes."""
    return make(libraries, tmp_path)
