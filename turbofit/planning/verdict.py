"""The form of the result of planning, for all code that makes plans.

The search of an engine's shapes, the fallback engine, a cluster and `which` decide in different
ways. All of them say by a `Verdict` what fits or why nothing fits, and return a plan as `Planned`.
`why_lost` says why another candidate of a plan lost, `cluster_plan` why a node is left out.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.plan import Plan, Remedy
from turbofit.core.struct import Struct

_FITS: Final = "fits: "


class Verdict(Struct):
    """Whether a model fits, and the sentence that says so.

    Attributes:
        subject: the model, and the conditions of the plan.
        found: the result, if the model fits.
        problem: what is missing; empty if the model fits.
        causes: the person's own options that prevent it; leaving out any one of them makes the
          model fit.
    """

    subject: str = ""
    found: str = ""
    problem: str = ""
    causes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def text(self) -> str:
        if self.fits:
            return f"{_FITS}{self.subject} {self.found}"
        return f"does not fit: {self.subject}{' ' if self.causes else ': '}{self.reason}"

    @property
    def reason(self) -> str:
        """Why the model does not fit, with the options that cause this; empty if the model fits."""
        causes = f"with {' and '.join(self.causes)}: " if self.causes else ""
        return f"{causes}{self.problem}"


class Planned(Struct):
    """The result of planning a model in one place: a plan, or only the reason for no plan."""

    plan: Plan | None
    verdict: Verdict

    @property
    def fits(self) -> bool:
        return self.verdict.fits

    @property
    def document(self) -> Plan:
        """The plan, which must exist."""
        assert self.plan is not None
        return self.plan

    def with_remedies(
        self, *, first: tuple[Remedy, ...] = (), last: tuple[Remedy, ...] = ()
    ) -> Planned:
        plan = self.document
        return replace(self, plan=replace(plan, remedies=(*first, *plan.remedies, *last)))


def fitting(change: str, found: str) -> Remedy:
    """Return a remedy whose ``change`` makes the plan fit; ``found`` says what then fits."""
    return Remedy(change=change, effect=f"{_FITS}{found}")


def all_fitting(plan: Plan | None) -> list[Remedy]:
    """Return the remedies that make a plan fit, cheapest first.

    Remedies with which a plan only comes closer are left out.
    """
    remedies = () if plan is None else plan.remedies
    return [remedy for remedy in remedies if remedy.effect.startswith(_FITS)]
