from __future__ import annotations

import msgspec
import pytest

from turbofit.core.machine import Gpu
from turbofit.core.presets import presets_dir
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.machine.presets import (
    assumed_note,
    context_bytes,
    fill,
    find_preset,
    load_preset,
    match_preset,
    nearest_names,
    preset_names,
)

#: CUDA's total of each card by public logs, in GiB to two digits: total minus reserved is at most
#: this, and at least half a percent below it.
CUDA_TOTAL = {
    "rtx2080ti": 10.75, "rtx3060": 11.64, "rtx3090": 23.69, "rtx4090": 23.65, "rtx5090": 31.37,
    "t4": 14.58, "v100-16g": 15.78, "v100-pcie-16g": 15.78, "v100-32g": 31.74,
    "v100-pcie-32g": 31.74, "a10": 22.07, "l4": 22.04, "l40s": 44.43, "a100-40g": 39.50,
    "a100-pcie-40g": 39.50, "a100-80g": 79.25, "a100-pcie-80g": 79.25, "h100": 79.19,
    "h100-pcie": 79.19, "h200": 139.81, "rtx3080": 9.77, "rtx3080-12g": 11.63, "rtx3080ti": 11.63,
    "rtx3090ti": 23.55, "rtx4060ti-16g": 15.57, "rtx4070tisuper": 15.60, "rtx4080": 15.67,
    "rtx4080super": 15.57, "rtx5070ti": 15.47, "rtx5080": 15.51, "rtxa5000": 23.57,
    "rtxa6000": 47.54, "rtx6000ada": 47.48, "rtxpro6000": 94.97, "a10g": 22.07, "a30": 23.69,
    "a40": 44.42, "l20": 44.39, "l40": 44.40, "a800-80g": 79.25, "a800-pcie-80g": 79.25,
    "h20": 95.00, "h800": 79.18, "b200": 178.36,
}  # fmt: skip
CORES = {(7, 0): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128}
CORES |= {(10, 0): 128, (12, 0): 128}


def measured(name: str, total: int, **more) -> Gpu:
    return Gpu(
        index=0, uuid="GPU-1", name=name, total=total, reserved=0, used=0, free=total, **more
    )


def test_every_file_is_named_and_every_name_has_a_file():
    files = {path.stem for path in (presets_dir() / "gpus").glob("*.yaml")}
    assert files - {"aliases", "context"} == set(preset_names())
    assert set(CUDA_TOTAL) == set(preset_names())


@pytest.mark.parametrize("key", preset_names())
def test_preset_is_complete_and_has_sources(key: str):
    preset = load_preset(key)
    figures = msgspec.to_builtins(preset)
    assert figures.pop("name")
    for name, figure in figures.items():
        assert len(figure["source"]) > 10, name
        if figure.get("basis") == "estimate":
            assert figure["sign"], f"{name}: an estimate says which way it errs"
    assert 0 < preset.context_mib.low <= preset.context_mib.high < 1024
    assert preset.reserved_mib.low is None or preset.reserved_mib.low <= preset.reserved_mib.value


@pytest.mark.parametrize("key", preset_names())
def test_preset_is_plausible(key: str):
    preset = load_preset(key)
    usable = (preset.total - preset.reserved) / GIB
    assert CUDA_TOTAL[key] * 0.980 < usable <= CUDA_TOTAL[key] + 0.006
    assert preset.compute_capability.value in CORES
    assert 28 <= preset.sm_count.value <= 188
    assert 2 * MIB < preset.l2.value <= 128 * MIB
    # Between 30 and 450 FLOP a byte on every card that is known.
    assert 30 < preset.dense_flops.value / preset.memory_bandwidth.value < 450
    assert preset.pcie.width == (8 if key == "rtx4060ti-16g" else 16)
    assert preset.nvlink.lanes_per_pair <= preset.nvlink.lanes
    assert (preset.nvlink.lanes == 0) == (preset.nvlink.lane_bandwidth == 0)
    assert not preset.nvlink.default or preset.nvlink.lanes


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("rtx3090", "rtx3090"), ("3090", "rtx3090"), ("RTX-3090", "rtx3090"),
        ("geforce rtx 3090", "rtx3090"), ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("rtx_3090", "rtx3090"), ("a100-80g", "a100-80g"), ("A100 80GB PCIe", "a100-pcie-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("A100-PCIE-40GB", "a100-pcie-40g"),
        ("a100", "a100-40g"), ("v100-32g", "v100-32g"), ("Tesla V100-SXM2-16GB", "v100-16g"),
        ("V100-32GB", "v100-32g"), ("h100", "h100"), ("H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("h200", "h200"), ("l4", "l4"), ("L40S", "l40s"),
        ("Tesla T4", "t4"), ("a10", "a10"), ("2080 Ti", "rtx2080ti"), ("3060-12GiB", "rtx3060"),
        ("RTX 3080", "rtx3080"), ("3080 12GB", "rtx3080-12g"), ("rtx3090ti", "rtx3090ti"),
        ("4070 Ti Super", "rtx4070tisuper"), ("A6000", "rtxa6000"), ("l40", "l40"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
        ("rtx 6000 ada", "rtx6000ada"),
        ("A800", "a800-80g"), ("h20", "h20"), ("H800", "h800"), ("b200", "b200"),
    ],
)  # fmt: skip
def test_names_as_people_type_them(typed: str, key: str):
    assert find_preset(typed) == key


@pytest.mark.parametrize("key", preset_names())
def test_nvml_name_and_memory_find_the_own_preset(key: str):
    preset = load_preset(key)
    assert match_preset(measured(preset.name, preset.total)) is preset


@pytest.mark.parametrize("name", ["", "rtx4070ti", "RTX 3090 Laptop GPU", "l2", "a100-20g", "gtx"])
def test_other_cards_are_not_taken_for_known_ones(name: str):
    assert find_preset(name) is None


def test_nearest_names():
    assert nearest_names("rtx3900")[0] == "rtx3090"
    assert nearest_names("a100 8g")[0].startswith("a100")
    assert nearest_names("☃") == []


def test_assumptions_are_said():
    assert "40 GB" in assumed_note("A100", 1)
    assert assumed_note("h100", 1) is None
    assert "NVLink" in assumed_note("H100", 8)
    assert assumed_note("rtx3090", 4) is None


def test_match_goes_by_name_and_memory():
    assert match_preset(measured("NVIDIA GeForce RTX 3060", 12288 * MIB)) is load_preset("rtx3060")
    assert match_preset(measured("NVIDIA GeForce RTX 3060", 8192 * MIB)) is None
    assert match_preset(measured("NVIDIA GeForce RTX 3090", 24268 * MIB)) is load_preset("rtx3090")
    assert match_preset(measured("NVIDIA GeForce RTX 4060 Ti", 8188 * MIB)) is None
    assert match_preset(measured("NVIDIA B300", 275040 * MIB)) is None
    assert match_preset(measured("NVIDIA H100 80GB HBM3", 81559 * MIB, mig=True)) is None


@pytest.mark.parametrize(
    ("key", "total"), [("rtxa6000", 46068), ("l40", 49140), ("rtx4090", 23028)]
)
def test_ecc_does_not_make_another_card(key: str, total: int):
    assert match_preset(measured(load_preset(key).name, total * MIB)) is load_preset(key)


def test_memory_tells_cards_of_one_name_apart():
    name = "NVIDIA GeForce RTX 3080"
    assert match_preset(measured(name, 10240 * MIB)) is load_preset("rtx3080")
    assert match_preset(measured(name, 12288 * MIB)) is load_preset("rtx3080-12g")
    assert "10 GB" in assumed_note("RTX 3080", 1)
    assert assumed_note("3080-12g", 1) is None


def test_fill_keeps_what_was_measured():
    gpu = fill(measured("NVIDIA L4", 23034 * MIB, sm_count=57))
    assert gpu.sm_count == 57
    assert gpu.l2 == 48 * MIB
    assert gpu.compute_capability == (8, 9)
    assert gpu.memory_bandwidth == 300 * 10**9
    assert (gpu.pcie.generation, gpu.pcie.width) == (4, 16)
    unknown = measured("NVIDIA B300", 275040 * MIB)
    assert fill(unknown) == unknown


def test_context_of_a_known_card_is_its_upper_end():
    size, note = context_bytes(measured("NVIDIA GeForce RTX 3090", 24576 * MIB))
    assert size == 360 * MIB
    assert "300-360 MiB" in note
    assert "Qwen3-VL/issues/297" in note


@pytest.mark.parametrize(
    ("sms", "plain"), [(132, 518), (60, 248), (32, 146), (188, 555), (34, 107), (None, 700)]
)
def test_context_of_an_unknown_card_lies_above_public_measurements(sms: int | None, plain: int):
    gpu = measured("NVIDIA X", GIB, sm_count=NA if sms is None else sms)
    size, note = context_bytes(gpu)
    assert size > plain * MIB
    assert size < (1.35 * plain + 250) * MIB
    assert note


def test_no_preset_has_a_larger_context_than_an_unknown_card():
    largest = max(load_preset(key).context_mib.high for key in preset_names())
    assert context_bytes(measured("NVIDIA X", GIB))[0] == largest * MIB
