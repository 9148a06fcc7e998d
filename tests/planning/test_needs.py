"""Transformers beside LMDeploy, of the interpreter that has both."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit import api
from turbofit.core.errors import PackageError
from turbofit.core.plan import Plan, PlannedEngine, Settings
from turbofit.model.draft_reader import read_draft
from turbofit.model.presets import preset_model
from turbofit.planning.needs import check_needs, need_warning


def plan_of(preset: str, engine: str = "pytorch") -> Plan:
    plan = plausible_plan()
    return replace(
        plan, model=preset_model(preset), engine=PlannedEngine(name=engine, version="0.18")
    )  # fmt: skip


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_fails_at_every_image_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lmdeploy="0.18.0", transformers="5.17.0")
    llava = plan_of("llava-1.5-7b")
    with pytest.raises(PackageError, match=r"Transformers 5\.17\.0.*fails at every image") as told:
        check_needs(llava)
    assert told.value.hint.endswith(" or pip install 'transformers<5'")
    assert "size of tensor" in told.value.message
    check_needs(plan_of("llava-1.5-7b", "transformers"))
    check_needs(plan_of("qwen2-vl-7b"))
    installed(monkeypatch, lmdeploy="0.18.0", transformers="4.57.6")
    check_needs(llava)


def test_an_older_transformers_lacks_newer_families(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lmdeploy="0.17.0", transformers="4.56.2")
    with pytest.raises(PackageError, match=r"LMDeploy 0\.17\.0 fails at its start") as told:
        check_needs(plan_of("qwen3-vl-8b"))
    assert told.value.hint == "pip install 'transformers>=4.57.6'"


def test_where_no_version_runs_the_hint_is_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lmdeploy="0.18.0", transformers="5.17.0")
    with pytest.raises(PackageError) as told:
        check_needs(plan_of("llava-v1.6-mistral-7b"))
    assert "--engine transformers" in told.value.hint


def test_lmdeploy_elsewhere_has_packages_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, transformers="5.17.0")
    check_needs(plan_of("llava-1.5-7b"))


def test_a_plan_names_the_versions_where_newer_ones_break() -> None:
    llava = api.plan("llava-1.5-7b", on="1xrtx3090", engine="pytorch")
    said = [text for text in llava.warnings if text.startswith("install transformers>=5.2")]
    assert said[0].endswith(" or transformers<5: with others LMDeploy 0.18 fails at every image")
    other = api.plan("qwen2-vl-2b", on="1xrtx3090")
    assert not [text for text in other.warnings if "transformers" in text]
    assert need_warning(plan_of("qwen3-vl-8b")) is None
    assert need_warning(plan_of("llava-1.5-7b", "transformers")) is None


def drafting(name: str, method: Any) -> Plan:
    plan = plan_of(name)
    draft = read_draft(plan.model, method, None, 1)
    return replace(plan, settings=Settings(speculative=draft))


@pytest.mark.parametrize(
    ("plan", "module", "title"),
    [
        (drafting("glm-4.5-air", "deepseek_mtp"), "flash_attn_interface", "FlashAttention-3"),
        (drafting("glm-4.7-flash", "deepseek_mtp"), "flash_mla", "FlashMLA"),
    ],
)
def test_drafting_needs_packages(
    plan: Plan, module: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"lmdeploy", module}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    check_needs(plan)
    there.remove(module)
    with pytest.raises(PackageError, match=f"{title}'s {module} is not installed"):
        check_needs(plan)
    there.remove("lmdeploy")  # it has another interpreter
    check_needs(plan)


@pytest.mark.parametrize(
    ("plan", "modules"),
    [
        (plan_of("gpt-oss-20b", "turbomind"), {"openai_harmony"}),
        (plan_of("gpt-oss-20b-bf16"), {"openai_harmony"}),
        (plan_of("qwen3-next-80b-a3b"), {"fla", "tilelang"}),
        (plan_of("qwen3.5-4b", "turbomind"), set()),
        (plan_of("internvl3.5-gpt-oss-20b-a4b", "turbomind"), set()),
        (plan_of("qwen2.5-7b", "transformers"), set()),
    ],
)
def test_what_lmdeploy_imports_for_one_model_is_looked_for_before_it_loads(
    plan: Plan, modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"lmdeploy", *modules}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    check_needs(plan)
    for module in modules:
        there.remove(module)
        with pytest.raises(PackageError, match=f"{module} is not installed") as told:
            check_needs(plan)
        assert told.value.hint.startswith("pip install")
        check_needs(plan, pretend=True)
        there.add(module)
