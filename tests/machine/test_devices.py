from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.nvml import (
    LOST,
    Gpu,
    Mig,
    Process,
    Scenario,
    gpu_3090,
    gpu_h100,
    in_process,
)
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.machine.nvml import GpuLostError, Nvml, answered
from turbofit.machine.nvml_machine import UNKNOWN_HOLDER, Device, read_device
from turbofit.machine.presets import load_preset


@pytest.fixture
def read(nvml_library: Path, tmp_path: Path):
    def read(gpu: Gpu, **scenario) -> Device:
        with in_process(nvml_library, Scenario([gpu], **scenario), tmp_path), Nvml() as nvml:
            try:
                handle = nvml.query("nvmlDeviceGetHandleByIndex", 0)
            except GpuLostError as exc:
                handle, lost = NA, str(exc)
            else:
                lost = None if answered(handle) else "no handle"
            return read_device(nvml, 0, handle, (0, 1, 0), first_part=1, no_handle=lost)

    return read


def test_what_nvml_does_not_say_comes_from_the_preset(read):
    gpu = read(gpu_3090(cc=None, cores=None, pcie_generation=None, pcie_width=None)).gpu
    assert gpu.compute_capability == (8, 6)
    assert gpu.sm_count == 82
    assert gpu.pcie.width == 16


def test_holders_largest_first_and_the_rest_unknown(read):
    gpu = gpu_3090(
        used=6 * GIB,
        compute=[Process(11, GIB, "/usr/bin/python3 -m x"), Process(12, 2 * GIB, "trtexec")],
        graphics=[Process(11, 300 * MIB, None), Process(13, 5 * MIB, "Xorg")],
    )
    holders = read(gpu).gpu.holders
    assert [(holder.pid, holder.name, holder.bytes) for holder in holders] == [
        (12, "trtexec", 2 * GIB),
        (11, "python3", GIB),
        (13, "Xorg", 5 * MIB),
        (NA, UNKNOWN_HOLDER, 3 * GIB - 5 * MIB),
    ]


def test_process_names_without_nvml(read):
    own = os.getpid()
    compute = [Process(own, GIB), Process(4_194_305, MIB), Process(5, MIB, "/opt/\x1b[31mx")]
    names = {h.pid: h.name for h in read(gpu_3090(used=2 * GIB, compute=compute)).gpu.holders}
    assert names[own] == Path("/proc/self/comm").read_text().strip()
    assert names[4_194_305] == "process 4194305"
    assert names[5] == "[31mx"


def test_memory_version_1_is_said(read):
    device = read(gpu_3090(used=GIB, compute=[Process(9, GIB, "p")]), memory_v1=True)
    gpu = device.gpu
    assert gpu.reserved == NA
    assert (gpu.used, gpu.free) == (GIB + 308 * MIB, 24268 * MIB - GIB)
    assert gpu.used + gpu.free == gpu.total
    assert "version 1" in device.warnings[0]
    assert gpu.holders[0].pid == 9
    assert "reserve" in gpu.holders[1].name
    assert gpu.holders[1].bytes == 308 * MIB


@pytest.mark.parametrize("change", [{"error": LOST}, {"no_handle": LOST}, {"no_handle": 999}])
def test_lost(read, change):
    device = read(gpu_3090(**change))
    assert device.gpu.total == NA
    assert device.gpu.name
    assert "cannot be read" in device.warnings[0]


def h100_in_parts() -> Gpu:
    return gpu_h100(
        mig=True,
        migs=[
            Mig("MIG-11", 40448 * MIB, 26 * MIB, sms=60, gi=2),
            Mig("MIG-22", 9984 * MIB, 9 * MIB, sms=16, gi=9),
            Mig("MIG-33", 9984 * MIB, 9 * MIB, sms=16, gi=10, compute=[Process(7, 5 * MIB, "p")]),
        ],
    )


def test_mig_instances_are_gpus_of_their_own(read):
    device = read(h100_in_parts())
    assert device.gpu is None
    assert [gpu.index for gpu in device.parts] == [1, 2, 3]
    assert device.default == (1, 2, 3)
    assert device.ordinal == 1
    first, _, third = device.parts
    assert first.mig
    assert (first.total, first.reserved, first.sm_count) == (40448 * MIB, 0, 60)
    assert first.compute_capability == (9, 0)
    whole = load_preset("h100")
    assert first.l2 == whole.l2.value
    assert first.memory_bandwidth == whole.memory_bandwidth.value * 40448 // 81559
    assert first.dense_flops == whole.dense_flops.value * 60 // 132
    assert [holder.name for holder in third.holders] == ["p", UNKNOWN_HOLDER]
    assert device.ids["MIG-22"] == 2
    assert device.ids[f"MIG-{gpu_h100().uuid}/9/0"] == 2


def test_compute_instances_that_share_memory_are_planned_with_once(read):
    parts = [Mig("MIG-1", 40 * GIB, sms=16, gi=2), Mig("MIG-2", 40 * GIB, sms=32, gi=2, ci=1)]
    device = read(gpu_h100(mig=True, migs=parts))
    assert len(device.parts) == 2
    assert device.default == (1,)
    assert "share one memory" in device.warnings[0]
