from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from turbofit.pretend.build import build


@pytest.fixture(scope="session")
def libraries() -> Path:
    """The pretend libraries, which all tests share; a changed source builds others."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    return build()
