"""Packages beside LMDeploy that a model needs to be served at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["check_needs", "need_warning"]


def need_warning(plan: Plan) -> str | None:
    """What must be installed, where newer versions of Transformers do not do.

    What is installed here is not looked at: the plan may be launched elsewhere.
    """
    if plan.model.vision is None or not plan.engine.of_lmdeploy:
        return None
    from turbofit.planning.compatibility import EFFECTS, FrontEnd

    front = FrontEnd(plan.engine.version, plan.model.architecture, plan.engine.name)
    failure, wanted = front.newest_failure(), " or ".join(front.requirements()[:2])
    if failure is None or not wanted:
        return None
    effect = EFFECTS[failure.step]
    return f"install {wanted}: with others LMDeploy {plan.engine.version} {effect}"


def check_needs(plan: Plan, *, pretend: bool = False) -> None:
    """Refuse a launch that would start and then fail with the versions that are installed.

    Args:
        plan: what is to be launched.
        pretend: on pretend GPUs, where such modules have stand-ins.

    Raises:
        PackageError: Transformers of this interpreter is of a version that does not do, or a
            module that LMDeploy imports for this model is not there.
    """
    if not plan.engine.of_lmdeploy:
        return
    if not pretend:
        _check_modules(plan)
    if plan.model.vision is None:
        return
    from importlib.metadata import PackageNotFoundError, version

    from turbofit.planning.compatibility import EFFECTS, FrontEnd, install_line

    try:
        lmdeploy, transformers = version("lmdeploy"), version("transformers")
    except PackageNotFoundError:
        return  # LMDeploy has another interpreter, and packages of its own
    front = FrontEnd(lmdeploy, plan.model.architecture, plan.engine.name)
    failure = front.failure(transformers)
    if failure is None:
        return
    wanted = front.requirements()
    raise PackageError(
        f"{plan.model.name} does not run with Transformers {transformers}, which is installed:"
        f" LMDeploy {lmdeploy} {EFFECTS[failure.step]} ({failure.error})",
        hint=install_line(wanted) or "plan with --engine transformers: LMDeploy runs it with none",
    )


def _check_modules(plan: Plan) -> None:
    """Modules without which the engine would end, perhaps after it has loaded the weights."""
    from importlib.util import find_spec

    from turbofit.planning.needed_modules import modules_for

    if find_spec("lmdeploy") is None:
        return  # LMDeploy has another interpreter, and packages of its own
    drafts = plan.settings.draft is not None
    for module in modules_for(plan.model, plan.engine.name, drafts=drafts):
        if find_spec(module.name) is None:
            raise PackageError(
                f"{module.title} is not installed: LMDeploy does not serve {plan.model.name} so"
                " without it",
                hint=module.mend,
            )
