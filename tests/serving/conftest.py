"""Checkpoints and ports for tests of launching."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_internvl2, make_internvl_hf, make_qwen2_vl
from tests.support.processes import free_port


@pytest.fixture(scope="session")
def internvl2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_internvl2(tmp_path_factory.mktemp("checkpoints") / "InternVL2-tiny")


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_vl(tmp_path_factory.mktemp("checkpoints") / "Qwen2-VL-tiny")


@pytest.fixture(scope="session")
def internvl_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_internvl_hf(tmp_path_factory.mktemp("checkpoints") / "InternVL3-tiny-hf")


@pytest.fixture
def port() -> int:
    """Two consecutive ports that nobody has right now; the first."""
    return free_port()
