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
    find_preset,
    load_preset,
    match_preset,
    nearest_names,
    preset_names,
)
from turbofit.machine.spec import parse_spec

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
    "h20": 95.00, "h800": 79.18, "b200": 178.36, "rtx2080ti-22g": 21.67, "rtx3060ti": 7.65,
    "rtx3070": 7.66, "rtx3070ti": 7.66, "rtx4060": 7.63, "rtx4060ti-8g": 7.63, "rtx4070": 11.72,
    "rtx4070super": 11.57, "rtx4070ti": 11.73, "rtx4090d": 23.65, "rtx4090-48g": 47.38,
    "rtx5060ti-16g": 15.52, "rtx5060ti-8g": 7.51, "rtx5070": 11.50, "a2": 14.56, "rtxa4000": 15.74,
    "rtxa4500": 19.58, "rtx4000ada": 19.58, "rtxpro5000": 47.27, "h100-nvl": 93.11, "gh200": 94.50,
    "gb200": 184.31, "b300": 267.69,
}  # fmt: skip
#: Compute capabilities that a preset may have.
CAPABILITIES = {(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}
#: Cards whose PCIe link has eight lanes.
EIGHT_LANES = {"a2", "rtx4060", "rtx4060ti-8g", "rtx4060ti-16g", "rtx5060ti-8g", "rtx5060ti-16g"}


def measured(name: str, total: int, **more) -> Gpu:
    return Gpu(
        index=0, uuid="GPU-1", name=name, total=total, reserved=0, used=0, free=total, **more
    )


def test_every_file_is_named_and_every_name_has_a_file():
    files = {path.stem for path in (presets_dir() / "gpus").glob("*.yaml")}
    assert files - {"aliases", "context", "unlisted", "unsupported"} == set(preset_names())
    assert set(CUDA_TOTAL) == set(preset_names())


def test_presets_are_complete_have_sources_and_are_plausible() -> None:
    for key in preset_names():
        is_plausible(key)


def is_plausible(key: str) -> None:
    preset = load_preset(key)
    figures = msgspec.to_builtins(preset)
    assert figures.pop("name")
    for name, figure in figures.items():
        assert len(figure["source"]) > 10, name
        if figure.get("basis") == "estimate":
            assert figure["sign"], f"{name}: an estimate says which way it errs"
    assert 0 < preset.context_mib.low <= preset.context_mib.high < 1024
    assert preset.reserved_mib.low is None or preset.reserved_mib.low <= preset.reserved_mib.value
    usable = (preset.total - preset.reserved) / GIB
    assert CUDA_TOTAL[key] * 0.980 < usable <= CUDA_TOTAL[key] + 0.006
    assert preset.compute_capability.value in CAPABILITIES
    assert 10 <= preset.sm_count.value <= 188
    assert 2 * MIB <= preset.l2.value <= 128 * MIB
    # Between 30 and 450 FLOP a byte on every card that is known.
    assert 30 < preset.dense_flops.value / preset.memory_bandwidth.value < 450
    assert preset.pcie.width == (8 if key in EIGHT_LANES else 16)
    assert preset.nvlink.lanes_per_pair <= preset.nvlink.lanes
    assert (preset.nvlink.lanes == 0) == (preset.nvlink.lane_bandwidth == 0)
    assert not preset.nvlink.default or preset.nvlink.lanes
    assert match_preset(measured(preset.name, preset.total)) is preset


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("3090", "rtx3090"), ("RTX-3090", "rtx3090"), ("geforce rtx_3090", "rtx3090"),
        ("A100 80GB PCIe", "a100-pcie-80g"), ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("A100-PCIE-40GB", "a100-pcie-40g"), ("a100", "a100-40g"), ("V100-32GB", "v100-32g"),
        ("H100 PCIe", "h100-pcie"), ("NVIDIA H100 80GB HBM3", "h100"), ("Tesla T4", "t4"),
        ("2080 Ti", "rtx2080ti"), ("3060-12GiB", "rtx3060"), ("3080 12GB", "rtx3080-12g"),
        ("4070 Ti Super", "rtx4070tisuper"), ("4070S", "rtx4070super"), ("A6000", "rtxa6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"), ("B300", "b300"),
        ("4060ti", "rtx4060ti-16g"), ("NVIDIA GeForce RTX 4090 D", "rtx4090d"),
        ("NVIDIA GH200 480GB", "gh200"), ("A100 80GB SXM4", "a100-80g"),
        ("RTX 4090 (24GB)", "rtx4090"), ("24GB 3090", "rtx3090"),
        ("4080 SUPER 16GB", "rtx4080super"), ("2080 Ti 11GB", "rtx2080ti"),
        ("RTX PRO 5000 Blackwell 48GB", "rtxpro5000"), ("Quadro RTX A5000 24 GB", "rtxa5000"),
        ("RTX PRO 6000 Blackwell Server Edition 96GB", "rtxpro6000"),
    ],
)  # fmt: skip
def test_names_as_people_type_them(typed: str, key: str):
    assert find_preset(typed) == key


def test_other_cards_are_not_taken_for_known_ones():
    for name in ("", "rtx4050", "RTX 3090 Laptop GPU", "l2", "a100-20g", "gtx", "4080 24GB"):
        assert find_preset(name) is None, name
    assert (nearest_names("rtx3900")[0], nearest_names("a100-80")[0]) == ("rtx3090", "a100-80g")
    assert nearest_names("☃") == nearest_names("mx450") == []


@pytest.mark.parametrize(
    ("name", "total", "key"),
    [
        ("RTX 3080", 10240, "rtx3080"), ("RTX 3080", 12288, "rtx3080-12g"),
        ("RTX 4090", 49140, "rtx4090-48g"), ("RTX 5060 Ti", 8151, "rtx5060ti-8g"),
        ("RTX A6000", 46068, "rtxa6000"), ("RTX 4090", 23028, "rtx4090"),  # with ECC
    ],
)  # fmt: skip
def test_memory_tells_cards_of_one_name_apart(name: str, total: int, key: str):
    assert match_preset(measured(f"NVIDIA GeForce {name}", total * MIB)) is load_preset(key)


@pytest.mark.parametrize(
    ("typed", "taken", "other"),
    [
        ("a100", "40 GB", "a100-80g"), ("RTX 4060 Ti", "16 GB", "rtx4060ti-8g"),
        ("RTX 4090", "24 GB", "rtx4090-48g"), ("gh200", "96 GB", "144 GB"),
        ("a4000", "ECC off", "total="),
    ],
)  # fmt: skip
def test_a_name_of_two_cards_says_which_one_it_took(typed: str, taken: str, other: str):
    note = assumed_note(typed, 1)
    assert taken in note
    assert other in note
    assert parse_spec(typed).warnings == (note,)


@pytest.mark.parametrize(("sms", "plain"), [(132, 518), (32, 146), (188, 555), (NA, 700)])
def test_context_of_an_unknown_card_lies_above_public_measurements(sms, plain: int):
    size, note = context_bytes(measured("NVIDIA X", GIB, sm_count=sms))
    assert plain * MIB < size < (1.35 * plain + 250) * MIB
    assert note
    largest = max(load_preset(key).context_mib.high for key in preset_names())
    assert context_bytes(measured("NVIDIA X", GIB))[0] == largest * MIB
