"""Packages beside LMDeploy that a model needs in certain versions to be served at all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from turbofit.core.errors import PackageError
from turbofit.model.families.engines import package_need

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["check_needs", "need_warning"]


def need_warning(plan: Plan) -> str | None:
    """What must be installed, for a plan that may be launched elsewhere."""
    need = package_need(plan.model, plan.engine.name)
    if need is None:
        return None
    name, wanted = need
    return f"install {name}{wanted}: with a newer one LMDeploy 0.18 fails at every image"


def check_needs(plan: Plan) -> None:
    """Refuse to launch what would start and then fail at every image.

    Raises:
        PackageError: a package of this interpreter is of a version that does not do.
    """
    from importlib.metadata import PackageNotFoundError, version

    need = package_need(plan.model, plan.engine.name)
    if need is None:
        return
    name, wanted = need
    try:
        version("lmdeploy")
        found = version(name)
    except PackageNotFoundError:
        return  # LMDeploy has another interpreter, and packages of its own
    if not _satisfies(found, wanted):
        raise PackageError(
            f"{plan.model.name} needs {name}{wanted} with LMDeploy 0.18, and {found} is installed:"
            " every image would fail",
            hint=f"pip install '{name}{wanted}'",
        )


def _satisfies(found: str, wanted: str) -> bool:
    """Whether a version is below the one that ``<`` names."""
    bound = wanted.removeprefix("<")
    return _numbers(found) < _numbers(bound)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
