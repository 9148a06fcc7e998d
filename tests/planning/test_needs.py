"""Packages beside LMDeploy, of the interpreter that has it."""

from __future__ import annotations

import importlib.metadata

import pytest
from msgspec.structs import replace

from bench.common.plans import plausible_plan
from turbofit.core.errors import PackageError
from turbofit.core.plan import Plan
from turbofit.planning.needs import check_needs, need_warning


def llava(engine: str = "pytorch") -> Plan:
    plan = plausible_plan()
    model = replace(plan.model, architecture="LlavaForConditionalGeneration")
    return replace(plan, model=model, engine=replace(plan.engine, name=engine))


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_fails_at_every_image_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lmdeploy="0.18.0", transformers="5.17.0")
    assert "transformers<5" in (need_warning(llava()) or "")
    with pytest.raises(PackageError, match=r"5\.17\.0"):
        check_needs(llava())
    check_needs(llava("transformers"))
    installed(monkeypatch, lmdeploy="0.18.0", transformers="4.57.6")
    check_needs(llava())


def test_lmdeploy_elsewhere_has_packages_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, transformers="5.17.0")
    check_needs(llava())
