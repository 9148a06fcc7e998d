"""The page of a plan, and of its run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.report.page import sections
from turbofit.report.page.bars import bars
from turbofit.report.page.blocks import paint
from turbofit.report.page.frame import framed
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.page.timeline import timeline
from turbofit.report.page.topology import topology
from turbofit.report.stored_documents import saved_document
from turbofit.report.views.plan.memory_view import ledger_blocks
from turbofit.report.views.plan.plan_view import capacity_blocks, limit_blocks

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.core.run_report import RunReport
    from turbofit.report.stored_documents import StoredPlan

__all__ = ["page"]


def page(saved: StoredPlan) -> str:
    """The report of a plan, and of its run where there was one, as HTML."""
    plan, run = saved.plan, saved.run
    return framed(
        title=f"{plan.model.name} on {plan.machine.name} - turbofit",
        head=join(sections.head(plan, run), sections.first_command(plan), sections.figures(plan)),
        sections=_parts(plan, run),
        made=f"turbofit {plan.turbofit_version}, planned {plan.created}. {_where(plan)}",
        document=saved_document(saved),
    )


def _parts(plan: Plan, run: RunReport | None) -> list[tuple[str, str, Markup]]:
    """The sections in order: id, title, content; empty ones are left out."""
    ledger = tag("details", tag("summary", "Every term"), paint(ledger_blocks(plan)))
    fits = plan.fits
    fix = ("remedies", "What more would give" if fits else "What would fit, cheapest first")
    parts = [
        ("warnings", "Warnings", sections.warnings(plan)),
        ("memory", "Memory of each GPU, from empty to full", join(bars(plan), ledger)),
        ("capacity", "What the KV cache holds", _capacity(plan)),
        ("limits", "What an image limit costs", paint(limit_blocks(plan)[1:])),
        ("compared", "Forecast, rehearsed, measured", sections.compared(plan, run)),
        ("timeline", "From the start to the last image", timeline(plan, run)),
        ("topology", "The GPUs and their groups", topology(plan)),
        ("settings", "Settings, and why", sections.settings(plan)),
        ("candidates", "Considered", sections.candidates(plan)),
        ("commands", "The engines' own commands", sections.commands(plan)),
    ]
    parts.insert(len(parts) - 1 if fits else 0, (*fix, sections.remedies(plan)))
    return [part for part in parts if part[2]]


def _capacity(plan: Plan) -> Markup:
    if not plan.kv.total_tokens:
        return Markup()
    return join(sections.users(plan), paint(capacity_blocks(plan)[1:]))


def _where(plan: Plan) -> str:
    source = plan.machine.source
    return "The machine is a preset." if source == "preset" else f"The machine was read: {source}."
