"""What a planner finds, in one form for all of them.

The search of an engine's shapes, the fallback engine, a cluster, several models on one host and the
search for cards each decide in a way of their own, and have reasons of their own. All of them say
what fits and why not by a `Verdict`, and hand a plan on as `Planned`. Why another candidate of a
plan lost is said in `explain.reasons`, why a node has no part in `cluster_plan`.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.plan import Plan, Remedy
from turbofit.core.struct import Struct

_FITS: Final = "fits: "


class Verdict(Struct):
    """Whether it fits, and the sentence that says so.

    Attributes:
        subject: the model, and with what it was planned.
        found: what it comes to, where it fits.
        why_not: what is missing; empty where it fits.
        causes: a person's own options; without each of them alone it would fit.
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
        """Why not, with the options that are the cause; empty where it fits."""
        causes = f"with {' and '.join(self.causes)}: " if self.causes else ""
        return f"{causes}{self.why_not}"


class JointVerdict(Verdict):
    """The verdict on several models at once."""

    @property
    def text(self) -> str:
        found = self.found if self.fits else self.why_not
        return f"{'fit' if self.fits else 'do not fit'} together: {found}"


class Planned(Struct):
    """What came of planning one model in one place: a plan, or only why none can be made."""

    plan: Plan | None
    verdict: Verdict

    @property
    def fits(self) -> bool:
        return self.verdict.fits

    @property
    def why_not(self) -> str:
        """Why it does not fit, where the model is known; empty where it fits."""
        return self.verdict.reason

    @property
    def document(self) -> Plan:
        """The plan, where one was made."""
        assert self.plan is not None
        return self.plan

    def with_remedies(
        self, *, first: tuple[Remedy, ...] = (), last: tuple[Remedy, ...] = ()
    ) -> Planned:
        plan = self.document
        return replace(self, plan=replace(plan, remedies=(*first, *plan.remedies, *last)))


def not_planned(why_not: str) -> Planned:
    """What an error says, where there is no plan at all."""
    return Planned(plan=None, verdict=Verdict(why_not=why_not))


def fitting(change: str, found: str) -> Remedy:
    """A change that makes it fit, and what it comes to then."""
    return Remedy(change=change, effect=f"{_FITS}{found}")


def first_fitting(planned: Planned) -> Remedy | None:
    """The cheapest change that makes it fit; None where those that are known only come closer."""
    remedies = () if planned.plan is None else planned.plan.remedies
    return next((remedy for remedy in remedies if remedy.effect.startswith(_FITS)), None)
