from __future__ import annotations

import re

import msgspec
import pytest

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.machine.presets import load_preset
from turbofit.machine.source import machine_from
from turbofit.machine.spec import parse_spec
from turbofit.machine.unlisted import slow_card

MIG = load_yaml(presets_dir() / "gpus" / "unlisted.yaml")["mig"]


@pytest.mark.parametrize(
    ("typed", "card"),
    [
        ("Tesla P40", "Pascal"), ("GTX 1080 Ti 11GB", "Pascal"), ("quadro gp100", "Pascal"),
        ("m40", "Maxwell"), ("gtx 980 ti", "Maxwell"), ("Titan X", "Maxwell"), ("k80", "Kepler"),
        ("780 Ti", "Kepler"),
        ("AMD Instinct MI210", "AMD"), ("7900xtx", "AMD"), ("Strix Halo", "AMD"), ("vega64", "AMD"),
        ("910B3", "Huawei"), ("Atlas 800T A2", "Huawei"), ("MLU370", "MetaX or Cambricon"),
        ("Intel Xeon Gold", "no GPU"), ("AMD EPYC 7763", "no GPU"), ("auto", "no card's name"),
        ("mps", "Apple"), ("Apple M4 Pro", "Apple"), ("m1-ultra", "Apple"), ("a770", "Intel"),
        ("gaudi2", "Intel"), ("Jetson AGX Orin 64GB", "Jetson"), ("orin-nx", "Jetson"),
        ("NVIDIA GB10", "DGX Spark"), ("g5.12xlarge", "A10G"), ("g6e.48xlarge", "L40S"),
        ("p4d.24xlarge", "eight"), ("a2-highgpu-1g", "A100"), ("g2-standard-4", "L4"),
        ("Standard_NC24ads_A100_v4", "A100"), ("Standard_NC24rs_v3", "V100"),
        ("3090-nvlink", "NVLink"), ("tpu-v5e", "without CUDA"), ("inferentia", "without CUDA"),
        ("gpu-box.local", "another machine's address"), ("me@gpu01", "another machine's address"),
        ("10.0.0.5", "another machine's address"),
    ],
)  # fmt: skip
def test_a_card_that_no_engine_serves_on_is_answered_by_name(typed: str, card: str):
    with pytest.raises(UsageError) as caught:
        parse_spec(f"2x{typed}:free=8GiB")
    assert card in caught.value.message
    assert caught.value.message.startswith(f"{typed} is ")
    assert "did you mean" not in caught.value.hint
    assert "\n" not in str(caught.value)


def refused(spec: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("typed", "cause", "spec", "total", "card"),
    [
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "a laptop's card", "rtx2080with", 7372, None),
        ("rtx4080 mobile", "a laptop's card", "rtx4080mobile", 11059, None),
        ("laptop 4090", "not the desktop's rtx4090", "laptop4090", 14745, None),
        ("notebook RTX 4060", "a laptop's card", "notebookrtx4060", 7372, None),
        ("rtx3070 16g", "rtx3070 has 8 GB", "rtx3070", 14745, "NVIDIA GeForce RTX 3070"),
        ("NVIDIA GeForce RTX 3080 20480 MiB", "has 10 GB", "rtx3080", 18432, None),
        ("1xtitanrtx", "only its memory and compute", "titanrtx", 22118, None),
        ("RTX A2000 12GB", "only its memory and compute", "rtxa2000", 5529, None),
        ("1660 super", "only its memory and compute", "1660super", 5529, None),
        ("GTX 1650 Ti mobile", "a laptop's card", "gtx1650timobile", 3686, None),
    ],
)  # fmt: skip
def test_a_card_that_is_not_whole_gets_its_memory_to_paste(
    typed: str, cause: str, spec: str, total: int, card: str | None
):
    error = refused(typed)
    assert cause in error.message
    assert "did you mean" not in error.hint
    found = re.match(r"(\S+):total=(\d+)MiB\S*", error.hint)
    assert found[1].startswith(spec)
    assert int(found[2]) == total
    gpu = parse_spec(found[0]).gpus[0]
    assert gpu.total == total * MIB
    assert card is None or gpu.name.startswith(card.removeprefix("NVIDIA ")) or card in gpu.name


@pytest.mark.parametrize("typed", ["MIG 3g.40gb", "MIG 1g.10gb+me", "3g.20gb", "2xMIG 2g.20gb"])
def test_a_slice_without_its_card_is_asked_back(typed: str):
    error = refused(typed)
    assert "is a MIG slice of an unnamed card" in error.message
    for spec in error.hint.split(" or "):
        assert parse_spec(spec).gpus[0].mig


def test_a_slice_is_a_part_of_its_card():
    for key, profile in ((row["cards"][0], name) for row in MIG for name in row["profiles"]):
        whole, gpu = load_preset(key), parse_spec(f"{key}:mig={profile}").gpus[0]
        nominal = int(profile.partition(".")[2].removesuffix("gb")) * 10**9
        assert 0.89 * nominal < gpu.total < 1.07 * nominal
        assert gpu.total <= whole.total - whole.reserved
        assert gpu.sm_count <= whole.sm_count.value


@pytest.mark.parametrize(
    "name", ["gtx1660super", "NVIDIA GeForce GTX 1650", "t1000", "1660 ti mobile"]
)
def test_a_card_without_tensor_cores_is_slow_and_says_so(name: str):
    machine = parse_spec(f"{name}:total=5GiB")
    gpu, slow = machine.gpus[0], slow_card(name)
    assert slow is not None
    assert (gpu.dense_flops, gpu.compute_capability) == (slow.flops, (7, 5))
    assert "has no tensor cores" in machine.warnings[0]
    # The same card, measured.
    read = msgspec.structs.replace(gpu, name=name, dense_flops=NA)
    measured = machine_from(
        msgspec.structs.replace(machine, gpus=(read,), warnings=(), source="nvml")
    )
    assert measured.gpus[0].dense_flops == slow.flops
    assert "has no tensor cores" in measured.warnings[0]
