"""Slices of HAMi and Volcano: limits of the environment, card by card."""

from __future__ import annotations

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from tests.support.pods import pod
from turbofit.core.machine import Machine
from turbofit.core.units import GIB, MIB
from turbofit.machine.spec import parse_spec
from turbofit.machine.visible import held_to_slices, slice_limits

LIMIT = "CUDA_DEVICE_MEMORY_LIMIT"


def told(machine: Machine) -> Machine:
    """The cards as HAMi makes NVML say them: the slice is all there is."""
    size = 12_000 * MIB
    gpus = tuple(replace(gpu, total=size, reserved=0, free=size) for gpu in machine.gpus)
    return replace(machine, gpus=gpus)


@pytest.mark.parametrize(
    ("environ", "limits"),
    [
        ({}, {}),
        ({LIMIT: "3000m"}, {0: 3000 * MIB, 1: 3000 * MIB}),
        ({f"{LIMIT}_0": "8g", f"{LIMIT}_1": "4096M"}, {0: 8 * GIB, 1: 4 * GIB}),
        ({LIMIT: "3000m", f"{LIMIT}_1": "2g"}, {0: 3000 * MIB, 1: 2 * GIB}),
        ({f"{LIMIT}_0": "1073741824"}, {0: GIB}),
        # A device map says which card a number is.
        ({f"{LIMIT}_0": "8g", "NVIDIA_DEVICE_MAP": "0:GPU-1a"}, {1: 8 * GIB}),
        ({f"{LIMIT}_0": "8g", "NVIDIA_DEVICE_MAP": "0:GPU-elsewhere"}, {}),
        # No limit, and nothing that HAMi-core would read as one.
        ({LIMIT: "0", f"{LIMIT}_0": ""}, {}),
        ({LIMIT: "half", f"{LIMIT}_7": "8g"}, {}),
    ],
)
def test_a_limit_is_of_its_card(environ: dict[str, str], limits: dict[int, int]) -> None:
    machine = pod()
    assert slice_limits(machine.gpus, machine.visible, environ) == limits


def test_a_number_counts_visible_cards() -> None:
    held = held_to_slices(replace(pod("3xrtx3090"), visible=(2, 0)), {f"{LIMIT}_0": "8g"})
    assert [gpu.limit for gpu in held.gpus] == [UNSET, UNSET, 8 * GIB]


def test_nvml_that_says_the_slice_is_not_believed() -> None:
    held = held_to_slices(told(pod()), {LIMIT: "12000m"})
    card = parse_spec("rtx3090").gpus[0]
    assert (held.gpus[0].total, held.gpus[0].free) == (card.total, card.free)
    assert held.gpus[0].ours == 12_000 * MIB
    assert "gives the whole card's 23.6 GiB" in held.warnings[0]
    # Nobody knows how large a card without a preset is, and it is said.
    held = held_to_slices(told(pod("2xbox:total=30GiB:sm=8.6")), {LIMIT: "12000m"})
    assert held.gpus[0].total == 12_000 * MIB
    assert "--budget 12000MiB" in held.warnings[0]
