"""Checks of installed packages, and of the driver for them."""

from __future__ import annotations

from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from packaging.specifiers import SpecifierSet

from tests.support.checkup import Find, Healthy, Make, remove, two
from tests.support.nvml import Scenario, gpu_3090
from tests.support.plans import plausible_plan
from turbofit import api
from turbofit.core.errors import PackageError
from turbofit.core.model import Adapter, Draft
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.model.presets import preset_model
from turbofit.planning.checks import plan_warnings, refuse
from turbofit.planning.examine.packages import bad_transformers, tried_transformers
from turbofit.planning.examine.scene import Scene, Sources

PACKAGES = [
    ("lmdeploy", "stops", lambda s: s.packages.pop("lmdeploy")),
    ("lmdeploy", "stops", lambda s: s.packages.update(lmdeploy="0.9.2")),
    ("lmdeploy", "warning", lambda s: s.packages.update(lmdeploy="0.19.0")),
    ("lmdeploy", "ok", lambda s: s.packages.update(lmdeploy="0.17.1")),
    ("kernels", "stops", lambda s: setattr(s, "census", None)),
    ("kernels", "unreadable", lambda s: (s.packages.pop("lmdeploy"), setattr(s, "census", None))),
    ("pairing", "warning", lambda s: s.packages.update(torch="2.13.0+cpu")),
    ("pairing", "ok", lambda s: (s.packages.update(torch="2.13.0+cpu"), _torch(s, "None"))),
    ("pairing", "warning", lambda s: s.packages.update(transformers="5.0.2")),
    ("pairing", "unreadable", lambda s: s.packages.pop("lmdeploy")),
    ("driver_cuda", "stops", lambda s: _torch(s, "'13.0'")),
    ("driver_cuda", "stops", lambda s: _torch(s, "None")),
    ("driver_cuda", "unreadable", lambda s: remove(s, "torch")),
    ("torch_architectures", "stops", lambda s: setattr(s, "built", ["sm_80"])),
    ("torch_architectures", "unreadable", lambda s: setattr(s, "built", None)),
    ("torch_architectures", "unreadable", lambda s: _torch(s, "None")),
    ("image_library", "ok", lambda s: None),
    ("image_library", "ok", lambda s: setattr(s, "library", PackageError("other", hint=""))),
    ("image_library", "warning", lambda s: setattr(s, "library", PackageError("no", hint="pip"))),
]


def _torch(places: Healthy, cuda: str) -> None:
    (places.root / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda}\n")


@pytest.mark.parametrize(("check", "state", "spoil"), PACKAGES)
def test_packages(find: Find, sources: Make, check: str, state: str, spoil: Any) -> None:
    places = sources()
    spoil(places)
    assert find(check, two(), places).state == state


@pytest.mark.parametrize(
    ("version", "hole"), [("0.12.1", "CVE-2026-33626"), ("0.14.0", "issues/4761"), ("0.15.0", "")]
)
def test_a_release_with_a_published_hole_is_said(
    find: Find, sources: Make, version: str, hole: str
) -> None:
    places = sources()
    places.packages.update(lmdeploy=version)
    why = find("lmdeploy", two(), places).why
    assert hole in why
    assert bool(hole) == ("address" in why)


@pytest.mark.parametrize(
    ("model", "transformers", "state", "words", "others"),
    [
        ("llava-1.5-7b", "5.17.0", "stops", ["fails at every image", "'transformers<5'"], []),
        ("llava-1.5-7b", "4.57.6", "ok", [], []),
        ("qwen2-vl-7b", "5.17.0", "ok", [], []),
        ("qwen2-vl-7b", None, "unreadable", [], []),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_run_a_model(
    find: Find, sources: Make, model: str, transformers: str | None, state: str,
    words: list[str], others: list[str],
) -> None:  # fmt: skip
    places = sources()
    places.packages["transformers"] = transformers
    found = find("front_ends", two(), places, model=preset_model(model))
    said = f"{found.seen} {found.fix}"
    assert found.state == state
    assert [word for word in words if word not in said] == []
    assert [word for word in others if word in said] == []


V100 = Scenario([gpu_3090(name="Tesla V100-SXM2-32GB", cc=70, total=32768 * MIB)])


@pytest.mark.parametrize(
    ("check", "state", "scenario", "words"),
    [
        ("driver_cuda", "stops", replace_fields(two(), cuda=11080), "12.8"),
        ("driver_cuda", "unreadable", replace_fields(two(), driver=None), ""),
        ("torch_architectures", "stops", V100, "CUDA 12"),
        ("torch_architectures", "unreadable", Scenario([gpu_3090(name="Nobody", cc=None)]), ""),
        ("kernels", "stops", Scenario([gpu_3090(name="Tesla P100", cc=60)]),
         "no code for Tesla P100, only for sm_70"),
    ],
)  # fmt: skip
def test_cards(
    find: Find, sources: Make, check: str, state: str, scenario: Any, words: str
) -> None:
    places = sources()
    places.built = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]
    found = find(check, scenario, places)
    assert (found.state, words in found.seen + found.fix) == (state, True)


def plan_of(preset: str, engine: str = "pytorch") -> Plan:
    facts = {"model": preset_model(preset), "device_map": {"model": 0}}
    return plausible_plan(gpus=1, tp=1, engine=engine, **facts)


def check_needs(plan: Plan, places: Sources, *, pretend: bool = False) -> None:
    refuse(Scene(places, "launch", plan=plan, pretend=pretend))


def test_what_fails_at_every_image_is_not_launched(sources: Make) -> None:
    places, llava = sources(), plan_of("llava-1.5-7b")
    with pytest.raises(PackageError, match=r"Transformers 5\.17\.0.*fails at every image") as told:
        check_needs(llava, places)
    assert told.value.hint.endswith(" or pip install 'transformers<5'")
    assert "size of tensor" in told.value.message
    check_needs(llava, places, pretend=True)  # a stand-in mends it there
    check_needs(plan_of("llava-1.5-7b", "transformers"), places)
    check_needs(plan_of("qwen2-vl-7b"), places)
    places.packages["transformers"] = "4.57.6"
    check_needs(llava, places)


def test_all_that_stops_a_launch_is_said_at_once(sources: Make) -> None:
    """One was said after the other, each after another installation."""
    places, llava = sources(), plan_of("llava-1.5-7b")
    places.environ["WORLD_SIZE"] = "2"
    both = plausible_plan(gpus=2, tp=2, model=llava.model, engine="pytorch")
    with pytest.raises(PackageError, match=r"fails at every image.*; WORLD_SIZE=2 is set") as told:
        check_needs(both, places)
    assert "'transformers<5'; " in told.value.hint


def test_a_plan_names_the_versions_where_newer_ones_break() -> None:
    llava = api.plan("llava-1.5-7b", on="1xrtx3090", engine="pytorch")
    said = [text for text in llava.warnings if "transformers>=5.2" in text]
    assert said[0].startswith("LMDeploy 0.18 fails at every image without transformers>=5.")
    assert said[0].endswith(" or transformers<5")
    other = api.plan("qwen2-vl-2b", on="1xrtx3090")
    assert not [text for text in other.warnings if "transformers" in text]
    assert not plan_warnings(plan_of("qwen3-vl-8b"), Sources({}))
    assert not plan_warnings(plan_of("llava-1.5-7b", "transformers"), Sources({}))


def with_lora(plan: Plan) -> Plan:
    lora = Adapter(name="sql", path="/lora", rank=8, modules=("q_proj",), file_bytes=1)
    return replace(plan, model=replace(plan.model, adapters=(lora,)))


def with_draft(plan: Plan) -> Plan:
    draft = Draft(algorithm="eagle", path="/draft", tokens=1, text=plan.model.text)
    return replace(plan, model=replace(plan.model, draft=draft))


@pytest.mark.parametrize(
    ("plan", "modules"),
    [
        (plan_of("gpt-oss-20b", "turbomind"), {"openai_harmony"}),
        (plan_of("gpt-oss-20b-bf16"), {"openai_harmony"}),
        (plan_of("qwen3-next-80b-a3b"), {"fla", "tilelang"}),
        (plan_of("qwen3.5-4b", "turbomind"), set()),
        (plan_of("internvl3.5-gpt-oss-20b-a4b", "turbomind"), set()),
        (plan_of("qwen2.5-7b", "transformers"), set()),
        (with_lora(plan_of("qwen2.5-7b")), {"peft"}),
        (with_draft(plan_of("llama-3.1-8b")), {"flash_attn_interface"}),
        (with_draft(plan_of("glm-4.7-flash")), {"flash_mla"}),
    ],
)
def test_what_lmdeploy_imports_for_one_model_is_looked_for_before_it_loads(
    plan: Plan, modules: set[str], sources: Make
) -> None:
    places = sources()
    places.modules = set(modules)
    check_needs(plan, places)
    for module in modules:
        places.modules.remove(module)
        with pytest.raises(PackageError, match=f"{module} not installed") as told:
            check_needs(plan, places)
        assert told.value.hint.startswith("pip install")
        check_needs(plan, places, pretend=True)
        places.modules.add(module)


def test_a_row_says_which_versions_fail_and_which_run() -> None:
    """Each requirement that helps admits no version with which the row fails."""
    for row in tried_transformers().rows:
        for requirement in row.install:
            bounds = requirement.removeprefix("transformers")
            ends = [end for end in (row.first, row.last) if end]
            assert not any(end in SpecifierSet(bounds) for end in ends), requirement
            assert "==" not in bounds
    failing = bad_transformers("LlavaForConditionalGeneration", ["pytorch"], "5.12.9")["pytorch"]
    assert failing.what == "fails at every image"
    assert not bad_transformers("LlavaForConditionalGeneration", ["pytorch"], "4.57.6")
    assert not bad_transformers("LlavaForConditionalGeneration", ["pytorch"], "5.21.1")
    assert bad_transformers("LlavaNextForConditionalGeneration", ["pytorch"], "4.57.6")
    assert not bad_transformers("LlamaForCausalLM", ["turbomind"], "4.57.6")


def test_the_extras_allow_no_newer_version_than_was_tried() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert project.count(f"<={tried_transformers().newest}") == 2
