"""Versions of Transformers beside LMDeploy that a model needs to be served at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["check_needs", "need_warning"]


def need_warning(plan: Plan) -> str | None:
    """What must be installed, where the newest Transformers does not do.

    Nothing is looked at here: the plan may be launched elsewhere.
    """
    if plan.model.vision is None or not plan.engine.of_lmdeploy:
        return None
    from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility

    front = FrontEnd(plan.engine.version, plan.model.architecture, plan.engine.name)
    failure = front.failure(compatibility().transformers[-1])
    wanted = front.requirement()
    if failure is None or wanted is None:
        return None
    effect = EFFECTS[failure.step]
    return f"install {wanted}: with a newer one LMDeploy {plan.engine.version} {effect}"


def check_needs(plan: Plan) -> None:
    """Refuse to launch what would start and then fail, by the versions that are installed.

    Raises:
        PackageError: Transformers of this interpreter is of a version that does not do.
    """
    if plan.model.vision is None or not plan.engine.of_lmdeploy:
        return
    from importlib.metadata import PackageNotFoundError, version

    from turbofit.planning.compatibility import EFFECTS, FrontEnd

    try:
        lmdeploy, transformers = version("lmdeploy"), version("transformers")
    except PackageNotFoundError:
        return  # LMDeploy has another interpreter, and packages of its own
    front = FrontEnd(lmdeploy, plan.model.architecture, plan.engine.name)
    failure = front.failure(transformers)
    if failure is None:
        return
    wanted = front.requirement()
    raise PackageError(
        f"{plan.model.name} does not run with Transformers {transformers}, which is installed:"
        f" LMDeploy {lmdeploy} {EFFECTS[failure.step]} ({failure.error})",
        hint=f"pip install '{wanted}'" if wanted else "--engine transformers: none that was tried runs",
    )
