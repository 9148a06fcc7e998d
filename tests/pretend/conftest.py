from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from turbofit.pretend.build import build


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretend libraries, built for this session."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    return build(tmp_path_factory.mktemp("pretend-cache"))
