"""What the tests of checks share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from tests.diagnose.conftest import Healthy, server_card
from tests.nvml.standin import P2P_NVLINK, Scenario
from turbofit.diagnose.doctor.finding import Finding

Make = Callable[..., Healthy]

Find = Callable[..., Finding]


def two(**changes: Any) -> Scenario:
    """Two server cards that reach each other over NVLink."""
    return Scenario([server_card(0, **changes), server_card(1, **changes)], p2p=P2P_NVLINK)


def remove(places: Healthy, folder: str) -> None:
    """A folder that the machine does not have."""
    shutil.rmtree(places.root / folder)
