"""Torch in the tests of merging: not in each worker that only collects them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def imported(request: pytest.FixtureRequest) -> None:
    request.module.torch = pytest.importorskip("torch")
    request.module.safe = pytest.importorskip("safetensors.torch")
