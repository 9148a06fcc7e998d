"""The doctor's check of TurboMind's kernels."""

from __future__ import annotations

from collections.abc import Callable

from tests.diagnose.conftest import Healthy, card, server_card
from tests.nvml.standin import Scenario
from turbofit.diagnose.doctor.finding import Finding

Make = Callable[..., Healthy]
Find = Callable[..., Finding]


def test_a_card_without_kernels(find: Find, sources: Make) -> None:
    old = Scenario([card(name="Tesla P100", cc=60)])
    found = find("kernels", old, sources())
    assert found.state == "stops"
    assert "no code for Tesla P100, only for sm_70" in found.seen


def test_weights_without_kernels(find: Find, sources: Make) -> None:
    blackwell = Scenario([card(name="NVIDIA GeForce RTX 5090", cc=120)])
    found = find("kernels", blackwell, sources())
    assert found.state == "warning"
    assert "RTX 5090: int4 (AWQ, GPTQ), fp8, mxfp4, experts in 16 bits" in found.seen
    assert find("kernels", Scenario([server_card(0)]), sources()).state == "ok"


def test_kernels_that_cannot_be_read(find: Find, sources: Make) -> None:
    places = sources()
    places.census = None
    assert find("kernels", Scenario([server_card(0)]), places).state == "unreadable"
