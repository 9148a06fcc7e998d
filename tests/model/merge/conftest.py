"""Torch in the tests of merging: not in each worker that only collects them."""

from __future__ import annotations

import pytest

from tests.model.merge.cases import make_adapter, make_base


@pytest.fixture(autouse=True, scope="module")
def imported(request: pytest.FixtureRequest) -> None:
    request.module.torch = pytest.importorskip("torch")
    request.module.safe = pytest.importorskip("safetensors.torch")


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "lora")
