"""Versions of Transformers beside LMDeploy that a model needs to be served at all."""

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
    """Refuse to launch what would start and then fail, by the versions that are installed.

    Args:
        plan: what is to be launched.
        pretend: on pretend GPUs, where kernels for drafting have a stand-in.

    Raises:
        PackageError: Transformers of this interpreter is of a version that does not do, or what
            speculative decoding needs is not there.
    """
    if not pretend:
        _check_draft(plan)
    if plan.model.vision is None or not plan.engine.of_lmdeploy:
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


def _check_draft(plan: Plan) -> None:
    draft = plan.settings.draft
    if draft is None:
        return
    from importlib.util import find_spec

    from turbofit.memory.pytorch.flash_attention import needed_modules

    if find_spec("lmdeploy") is None:
        return  # LMDeploy has another interpreter, and packages of its own
    for title in needed_modules(draft):
        if find_spec(title.rpartition(" ")[2]) is None:
            raise PackageError(
                f"{title} is not installed: LMDeploy does not draft without it",
                hint="build it from the sources of that name, or serve without"
                " --speculative-algorithm",
            )
