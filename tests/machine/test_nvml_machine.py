from __future__ import annotations

import re
from pathlib import Path

import pytest

import turbofit
from tests.support.nvml import (
    LOST,
    P2P_ALL,
    P2P_NVLINK,
    Gpu,
    Mig,
    Process,
    Scenario,
    four_3090,
    gpu_3090,
    gpu_h100,
    in_process,
)
from turbofit.core.errors import MachineError
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.machine.nvml import Nvml
from turbofit.machine.nvml_machine import UNKNOWN_HOLDER, Device, read_devices
from turbofit.machine.presets import load_preset
from turbofit.machine.source import machine_from


def test_slices_of_the_environment_are_budgets(measured):
    machine = measured(four_3090(count=2), CUDA_DEVICE_MEMORY_LIMIT_1="8g")
    assert [gpu.ours == gpu.usable for gpu in machine.gpus] == [True, False]
    assert machine.gpus[1].ours == 8 * GIB
    assert "GPU 1 is a slice of 8.0 GiB (HAMi, Volcano)" in machine.warnings[0]


def test_nvlinked_pairs(measured):
    machine = measured(four_3090([(0, 2), (1, 3)]))
    joined = {(link.a, link.b): link for link in machine.links if link.nvlinked}
    assert set(joined) == {(0, 2), (1, 3)}
    assert all(link.peers and link.nvlinks == 4 for link in joined.values())
    assert joined[0, 2].nvlink_bandwidth == 4 * 14_062_500_000
    far = machine.link(0, 1)
    assert far.p2p_read is far.p2p_write is False
    assert (far.nvlinks, far.nvlink_bandwidth, far.ancestor) == (0, NA, "hostbridge")


def test_nvswitch(measured):
    machine = measured(Scenario([gpu_h100(i) for i in range(8)], p2p=P2P_NVLINK, ancestor=50))
    assert len(machine.links) == 28
    assert {link.nvlinks for link in machine.links} == {18}
    assert {link.nvlink_bandwidth for link in machine.links} == {450 * 10**9}
    assert {link.ancestor for link in machine.links} == {"system"}
    # Lanes to a switch count only where NVML says that the two reach each other over NVLink.
    (link,) = measured(Scenario([gpu_h100(0), gpu_h100(1)], p2p=P2P_ALL)).links
    assert (link.nvlinks, link.peers) == (0, True)
    (link,) = measured(Scenario([gpu_3090(0), gpu_3090(1)], p2p=None, ancestor=None)).links
    assert (link.p2p_read, link.p2p_write, link.ancestor, link.peers) == (NA, NA, NA, False)
    (link,) = measured(Scenario([gpu_3090(0), gpu_3090(1)], p2p=(6, 6, 6))).links
    assert link.p2p_read == NA
    # Known in one direction alone: 6 is unknown, 0 works, 5 does not.
    for back, access in ((6, NA), (0, True), (5, False)):
        one_way = Scenario([gpu_3090(0), gpu_3090(1)], p2p=(0, 0, 5), back=(back, back, 5))
        (link,) = measured(one_way).links
        assert (link.p2p_read, link.p2p_write) == (access, access)


def test_cuda_visible_devices(measured):
    scenario = four_3090()
    assert measured(scenario, CUDA_VISIBLE_DEVICES="2,0").visible == (2, 0)
    machine = measured(scenario, CUDA_VISIBLE_DEVICES="1,5,2")
    assert machine.visible == (1,)
    assert "5,2" in machine.warnings[0]
    assert len(machine.gpus) == 4
    assert measured(scenario, CUDA_VISIBLE_DEVICES=scenario.gpus[3].uuid[:12]).visible == (3,)
    for value in ("", "7"):
        with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES") as caught:
            measured(scenario, CUDA_VISIBLE_DEVICES=value)
        assert "--on" in caught.value.hint


def test_a_lost_gpu_is_a_warning_or_stops_where_it_is_needed(measured):
    scenario = four_3090()
    scenario.gpus[1].error = LOST
    machine = measured(scenario)
    assert (machine.visible, machine.gpu(1).total) == ((0, 2, 3), NA)
    assert "GPU 1 cannot be read" in machine.warnings[0]
    assert measured(scenario, gpus="0,2").visible == (0, 2)
    assert measured(scenario, CUDA_VISIBLE_DEVICES="3").visible == (3,)
    for call in ({"gpus": "0,1"}, {"CUDA_VISIBLE_DEVICES": "1,2"}):
        with pytest.raises(MachineError, match=r"GPU 1 \(lost GPU\).* cannot be read") as caught:
            measured(scenario, **call)
        assert "--gpus" in caught.value.hint
    for no_handle in (LOST, 999):
        with pytest.raises(MachineError, match=r"GPU 0 \(.+ cannot be read"):
            measured(Scenario([gpu_3090(0, no_handle=no_handle)]))


def test_mig_instances_are_numbered_after_whole_gpus_and_planned_by_themselves(measured):
    parts = [Mig("MIG-aaaa", 40448 * MIB, sms=60, gi=2), Mig("MIG-bbbb", 20096 * MIB, sms=32, gi=5)]
    scenario = Scenario([gpu_h100(0, mig=True, migs=parts), gpu_h100(1)], p2p=P2P_NVLINK)
    machine = measured(scenario)
    assert [(gpu.index, gpu.mig) for gpu in machine.gpus] == [(1, False), (2, True), (3, True)]
    assert sorted(machine.visible) == [1, 2, 3]
    assert [(link.a, link.b) for link in machine.links] == [(1, 2), (1, 3), (2, 3)]
    assert not any(link.peers for link in machine.links)
    for value, visible in (("MIG-bbbb", 3), (f"MIG-{gpu_h100(0).uuid}/2/0", 2), ("0", 2)):
        assert measured(scenario, CUDA_VISIBLE_DEVICES=value).visible == (visible,)
    assert measured(scenario, gpus="MIG-aaaa").visible == (2,)
    said = [text for text in machine.warnings if "is a MIG slice with" in text]
    assert [re.search(r"(\d+) SMs", text)[1] for text in said] == ["60", "32"]
    uncut = measured(Scenario([gpu_h100(0, mig=True), gpu_h100(1), gpu_h100(2)]))
    assert [(link.a, link.b) for link in uncut.links] == [(1, 2)]
    assert "has no instance" in uncut.warnings[0]
    plan = turbofit.plan("internvl2-1b", on=machine_from(machine, gpus="2,3"))
    assert plan.fits
    assert {len(group) for group in plan.groups} == {1}


@pytest.mark.parametrize(
    ("name", "total", "said"),
    [
        (
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            16376,
            "unknown are the card's l2, memory bandwidth",
        ),
        ("GRID V100DX-32C", 32768, "is a vGPU, which shares its card's time"),
        ("NVIDIA GeForce RTX 3080", 20480, "as a slow card"),
    ],
)
def test_a_card_that_is_not_of_that_name_takes_nothing_of_its_preset(measured, name, total, said):
    machine = measured(Scenario([gpu_3090(0, name=name, total=total * MIB, reserved=0)]))
    gpu = machine.gpus[0]
    assert (gpu.memory_bandwidth, gpu.dense_flops, gpu.l2, gpu.total) == (NA, NA, NA, total * MIB)
    (text,) = [text for text in machine.warnings if text.startswith(name)]
    assert said in text


@pytest.fixture
def read(nvml_library: Path, tmp_path: Path):
    def read(gpu: Gpu, **scenario) -> Device:
        with in_process(nvml_library, Scenario([gpu], **scenario), tmp_path), Nvml() as nvml:
            return read_devices(nvml)[0]

    return read


def test_what_nvml_does_not_say_comes_from_the_preset(read):
    gpu = read(gpu_3090(cc=None, cores=None, pcie_generation=None, pcie_width=None)).gpus[0]
    assert (gpu.compute_capability, gpu.sm_count, gpu.pcie.width) == ((8, 6), 82, 16)


def test_holders_largest_first_and_the_rest_unknown(read):
    gpu = gpu_3090(
        used=6 * GIB,
        compute=[Process(11, GIB, "/usr/bin/python3 -m x"), Process(12, 2 * GIB, "trtexec")],
        graphics=[Process(11, 300 * MIB, None), Process(13, 5 * MIB, "Xorg")],
    )
    holders = read(gpu).gpus[0].holders
    assert [(holder.pid, holder.name, holder.bytes) for holder in holders] == [
        (12, "trtexec", 2 * GIB),
        (11, "python3", GIB),
        (13, "Xorg", 5 * MIB),
        (NA, UNKNOWN_HOLDER, 3 * GIB - 5 * MIB),
    ]


def test_process_names_without_nvml(read):
    compute = [Process(4_194_305, MIB), Process(5, MIB, "/opt/\x1b[31mx")]
    gpu = read(gpu_3090(used=2 * GIB, compute=compute)).gpus[0]
    names = {holder.pid: holder.name for holder in gpu.holders}
    assert (names[4_194_305], names[5]) == ("process 4194305", "[31mx")


def test_mig_instances_are_gpus_of_their_own(read):
    parts = [
        Mig("MIG-11", 40448 * MIB, 26 * MIB, sms=60, gi=2),
        Mig("MIG-33", 9984 * MIB, 9 * MIB, sms=16, gi=10, compute=[Process(7, 5 * MIB, "p")]),
    ]
    device = read(gpu_h100(mig=True, migs=parts))
    first, second = device.gpus
    assert first.mig
    assert (first.total, first.reserved, first.sm_count) == (40448 * MIB, 0, 60)
    assert first.compute_capability == (9, 0)
    whole = load_preset("h100")
    assert first.l2 == whole.l2.value
    assert first.memory_bandwidth == whole.memory_bandwidth.value * 40448 // 81559
    assert first.dense_flops == whole.dense_flops.value * 60 // 132
    assert [holder.name for holder in second.holders] == ["p", UNKNOWN_HOLDER]
    # Compute instances that share memory are planned with once.
    parts = [Mig("MIG-1", 40 * GIB, sms=16, gi=2), Mig("MIG-2", 40 * GIB, sms=32, gi=2, ci=1)]
    device = read(gpu_h100(mig=True, migs=parts))
    assert (len(device.gpus), device.default) == (2, [1])
    assert "share one memory" in device.warnings[0]
