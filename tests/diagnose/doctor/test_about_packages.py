"""Checks of installed packages, and of the driver for them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.diagnose.conftest import Healthy, card
from tests.diagnose.doctor.support import Find, Make, remove, two
from tests.nvml.standin import Scenario
from turbofit.core.units import MIB
from turbofit.diagnose.doctor.about_packages import satisfies
from turbofit.model.presets import preset_model
from turbofit.planning.compatibility import compatibility

PACKAGES = [
    ("lmdeploy", "stops", lambda s: s.packages.pop("lmdeploy")),
    ("lmdeploy", "stops", lambda s: s.packages.update(lmdeploy="0.9.2")),
    ("lmdeploy", "warning", lambda s: s.packages.update(lmdeploy="0.19.0")),
    ("lmdeploy", "warning", lambda s: s.packages.update(lmdeploy="0.17.1")),
    ("pairing", "warning", lambda s: s.packages.update(torch="2.13.0+cpu")),
    ("pairing", "warning", lambda s: s.packages.update(transformers="5.0.2")),
    ("pairing", "unreadable", lambda s: setattr(s, "demands", None)),
    ("pairing", "unreadable", lambda s: setattr(s, "demands", ["numpy"])),
    ("turbomind", "stops", lambda s: remove(s, "lmdeploy/turbomind")),
    ("turbomind", "unreadable", lambda s: remove(s, "lmdeploy")),
    ("xgrammar", "warning", lambda s: s.packages.pop("xgrammar")),
    ("xgrammar", "ok", lambda s: (s.packages.pop("xgrammar"), s.modules.add("xgrammar"))),
    ("driver_cuda", "stops", lambda s: _torch(s, "'13.0'")),
    ("driver_cuda", "stops", lambda s: _torch(s, "None")),
    ("driver_cuda", "unreadable", lambda s: remove(s, "torch")),
    ("torch_architectures", "stops", lambda s: setattr(s, "built", ["sm_80"])),
    ("torch_architectures", "unreadable", lambda s: setattr(s, "built", None)),
    ("torch_architectures", "unreadable", lambda s: _torch(s, "None")),
]


def _torch(places: Healthy, cuda: str) -> None:
    (places.root / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda}\n")


@pytest.mark.parametrize(("check", "state", "spoil"), PACKAGES)
def test_packages(find: Find, sources: Make, check: str, state: str, spoil: Any) -> None:
    places = sources()
    spoil(places)
    assert find(check, two(), places).state == state


def test_structured_output_without_xgrammar_says_what_it_stops(
    find: Find, sources: Make, checkup: Any
) -> None:
    places = sources()
    del places.packages["xgrammar"]
    found = find("xgrammar", two(), places)
    assert "response_format" in found.why
    assert found.fix == "pip install xgrammar"
    del places.packages["lmdeploy"]  # one finding is enough
    assert "xgrammar" not in {one.check for one in checkup(two(), places).findings}


def test_a_pair_that_does_not_run_the_model(find: Find, sources: Make) -> None:
    places, llava = sources(), preset_model("llava-1.5-7b")
    found = find("front_ends", two(), places, model=llava)
    assert found.state == "stops"
    assert found.fix.endswith("pip install 'transformers<5'")
    assert "fails at every image" in found.seen
    assert find("front_ends", two(), places, model=preset_model("qwen2-vl-7b")).state == "ok"
    places.packages["transformers"] = "4.57.6"
    assert find("front_ends", two(), places, model=llava).state == "ok"
    places.packages["transformers"] = "4.53.3"  # LMDeploy's metadata exclude it
    found = find("front_ends", two(), places, model=preset_model("internvl3-8b-hf"))
    assert found.state == "warning"
    assert "GptOssConfig" in found.seen


def test_families_that_the_pair_does_not_run(find: Find, sources: Make) -> None:
    places = sources()
    places.packages["transformers"] = compatibility().transformers["0.18"][-1]
    found = find("front_ends", two(), places)
    assert found.state == "ok"
    assert "Glm4vForConditionalGeneration (<=5.19.0)" in found.seen
    assert "Llava" not in found.seen
    assert "+" not in found.seen
    places.packages["transformers"] = "4.56.2"
    found = find("front_ends", two(), places)
    assert found.state == "warning"
    assert "Qwen3VLForConditionalGeneration" in found.seen
    assert ">=4.57.6" in found.seen
    assert "Qwen2VL" not in found.seen
    del places.packages["transformers"]
    assert find("front_ends", two(), places).state == "unreadable"


def test_two_wheels_of_nccl_own_one_file(find: Find, sources: Make) -> None:
    places = sources()
    places.packages["nvidia-nccl-cu13"], places.records["nvidia-nccl-cu13"] = "2.29.7", 300
    found = find("nccl", two(), places)
    assert found.state == "ok"
    assert "nvidia-nccl-cu12 2.32.3, written over nvidia-nccl-cu13 2.29.7" in found.seen
    library = places.root / "libnccl.so.2"
    library.write_bytes(bytes(300))
    found = find("nccl", two(), places)
    assert found.state == "warning"
    assert found.fix.endswith("nvidia-nccl-cu12==2.32.3")
    library.write_bytes(bytes(7))
    assert find("nccl", two(), places).state == "unreadable"
    library.unlink()
    found = find("nccl", two(), places)
    assert found.state == "stops"
    assert found.fix == "pip install --force-reinstall --no-deps nvidia-nccl-cu12==2.32.3"
    places.records.clear()
    assert find("nccl", two(), places).state == "unreadable"


def test_an_old_driver(find: Find, sources: Make) -> None:
    scenario = two()
    scenario.cuda = 11080
    found = find("driver_cuda", scenario, sources())
    assert found.state == "stops"
    assert "12.8" in found.seen
    scenario.cuda, scenario.driver = 12000, "520.61.05"
    assert find("driver_cuda", scenario, sources()).state == "stops"
    scenario.driver = None
    assert find("driver_cuda", scenario, sources()).state == "unreadable"


def test_a_v100_with_torch_for_cuda_13(find: Find, sources: Make) -> None:
    places = sources()
    places.built = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]
    v100 = Scenario([card(name="Tesla V100-SXM2-32GB", cc=70, total=32768 * MIB)])
    found = find("torch_architectures", v100, places)
    assert found.state == "stops"
    assert "CUDA 12" in found.fix
    assert find("compute_capability", v100, sources()).state == "warning"
    none = Scenario([card(name="Nobody", cc=None)])
    assert find("compute_capability", none, sources()).state == "unreadable"


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.12.1", "<=2.12.1,>=2.0.0", True), ("2.13.0+cpu", "<=2.12.1", False),
        ("5.0.3", "!=5.0.*", False), ("5.1", "!=5.0.*,>=4.56.0", True), ("2", ">=2.0.0", True),
        ("3.1", "~=3.0", True), ("4.0", "~=3.0", False), ("1.0", "", True), ("1.0", "==1.0", True),
    ],
)  # fmt: skip
def test_bounds(version: str, bounds: str, fits: bool) -> None:
    assert satisfies(version, bounds) is fits
