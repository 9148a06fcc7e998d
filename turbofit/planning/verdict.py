"""The result of planning in one form, for all that makes plans.

The search of an engine's shapes, the fallback engine, a cluster and the search for cards each
decide in a way of their own, and have reasons of their own. All of them say what fits and why not
by a `Verdict`, and hand a plan on as `Planned`. `planning.reasons` says why another candidate of a
plan lost, `cluster_plan` why a node has no part.
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
        found: the result, if it fits.
        why_not: what is missing; empty if it fits.
        causes: a person's own options; without any one of them it would fit.
    """

    subject: str = ""
    found: str = ""
    why_not: str = ""
    causes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.why_not

    @property
    def text(self) -> str:
        if self.fits:
            return f"{_FITS}{self.subject} {self.found}"
        return f"does not fit: {self.subject}{' ' if self.causes else ': '}{self.reason}"

    @property
    def reason(self) -> str:
        """Why the model does not fit, with the options that cause this; empty if the model fits."""
        causes = f"with {' and '.join(self.causes)}: " if self.causes else ""
        return f"{causes}{self.why_not}"


class Planned(Struct):
    """The result of planning a model in one place: a plan, or only why none is possible."""

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
    """Return a remedy whose ``change`` makes the plan fit; ``found`` is what then fits."""
    return Remedy(change=change, effect=f"{_FITS}{found}")


def all_fitting(plan: Plan | None) -> list[Remedy]:
    """Return the remedies that make a plan fit, the cheapest first; others only come closer."""
    remedies = () if plan is None else plan.remedies
    return [remedy for remedy in remedies if remedy.effect.startswith(_FITS)]
