from __future__ import annotations

import re

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.machine.presets import find_preset, load_preset, preset_names
from turbofit.machine.spec import parse_spec
from turbofit.machine.unlisted import unsupported_card

ROWS = load_yaml(presets_dir() / "gpus" / "unsupported.yaml")["cards"]


@pytest.mark.parametrize(
    ("typed", "card"),
    [
        ("p40", "Pascal"), ("Tesla P40", "Pascal"), ("P100-PCIE-16GB", "Pascal"), ("p4", "Pascal"),
        ("1080ti", "Pascal"), ("GTX 1080 Ti 11GB", "Pascal"),
        ("NVIDIA GeForce GTX 1060", "Pascal"),
        ("Titan Xp", "Pascal"), ("Quadro P5000", "Pascal"), ("quadro gp100", "Pascal"),
        ("m40", "Maxwell"), ("Tesla M4", "Maxwell"), ("gtx 980 ti", "Maxwell"),
        ("750ti", "Maxwell"), ("Titan X", "Maxwell"), ("k80", "Kepler"), ("Tesla K40m", "Kepler"),
        ("780 Ti", "Kepler"),
        ("1660 super", "without tensor cores"), ("GTX 1650", "without tensor cores"),
        ("mi300x", "AMD"), ("MI250", "AMD"), ("AMD Instinct MI210", "AMD"), ("rx7900xtx", "AMD"),
        ("Radeon RX 6800", "AMD"), ("w7900", "AMD"), ("Strix Halo", "AMD"), ("vega64", "AMD"),
        ("ascend 910b", "Huawei"), ("910B3", "Huawei"), ("Atlas 800T A2", "Huawei"),
        ("310p", "Huawei"), ("MLU370", "MetaX or Cambricon"), ("metax c500", "MetaX or Cambricon"),
        ("m2", "Apple"), ("M3 Max", "Apple"), ("Apple M4 Pro", "Apple"), ("m1-ultra", "Apple"),
        ("Intel Arc A770", "Intel"), ("a770", "Intel"), ("b580", "Intel"), ("gaudi2", "Intel"),
        ("max1550", "Intel"), ("Jetson AGX Orin 64GB", "Jetson"), ("orin-nx", "Jetson"),
        ("thor", "Jetson"), ("xavier", "Jetson"), ("gb10", "DGX Spark"), ("DGX Spark", "DGX Spark"),
        ("NVIDIA GB10", "DGX Spark"), ("tpu-v5e", "without CUDA"), ("inferentia", "without CUDA"),
    ],
)  # fmt: skip
def test_a_card_that_no_engine_serves_on_is_answered_by_name(typed: str, card: str):
    with pytest.raises(UsageError) as caught:
        parse_spec(f"2x{typed}:free=8GiB")
    assert card in caught.value.message
    assert caught.value.message.startswith(f"{typed} is ")
    assert "did you mean" not in caught.value.hint
    assert "\n" not in str(caught.value)


def test_no_card_with_a_preset_is_among_them():
    names = load_yaml(presets_dir() / "gpus" / "aliases.yaml")["presets"]
    typed = {name for key, others in names.items() for name in (key, *others)}
    typed |= {load_preset(key).name for key in preset_names()}
    assert [name for name in sorted(typed) if unsupported_card(name)] == []


@pytest.mark.parametrize("name", ["", "x", "rtx3900", "a100-8g", "titan v", "titan rtx", "l2"])
def test_other_names_are_left_to_the_nearest_spelling(name: str):
    assert unsupported_card(name) is None
    assert find_preset(name) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["card"][:32])
def test_each_row_says_where_it_is_written(row: dict[str, object]):
    told = f"{row['why']} {row['instead']}"
    assert re.search(r"\w+\.(com|io|ai)\b|--on", told)
    assert "--device" in told or re.search(r"issues/\d+|docs\.", told)
