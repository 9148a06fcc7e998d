"""A plan in a notebook: the page in a frame of its own, whose styles and script stay inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.report.page.build import page
from turbofit.report.page.tag import tag
from turbofit.report.stored_documents import StoredPlan

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["frame"]

_HEIGHT: Final = 640


def frame(plan: Plan) -> str:
    """The page as an ``<iframe>``: scripts run, and reach nothing of the notebook."""
    return tag(
        "iframe",
        srcdoc=page(StoredPlan(plan, None, "notebook")),
        sandbox="allow-scripts",
        style=f"width:100%;height:{_HEIGHT}px;border:0",
        title=f"turbofit: {plan.model.name} on {plan.machine.name}",
    )
