"""What planners find: one sentence of each case, and what a caller reads of it."""

from __future__ import annotations

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.plan import Remedy
from turbofit.planning.verdict import (
    Planned,
    Verdict,
    first_fitting,
    fitting,
    not_planned,
)


def test_a_verdict_says_whether_it_fits_and_why_not_with_its_causes() -> None:
    assert Verdict(subject="M", found="on GPU 0: 3 requests").text == "fits: M on GPU 0: 3 requests"
    short = Verdict(subject="M", why_not="1 GiB short")
    assert (short.fits, short.text) == (False, "does not fit: M: 1 GiB short")
    caused = Verdict(subject="M", why_not="1 GiB short", causes=("--tp 2", "--images 9"))
    assert caused.text == "does not fit: M with --tp 2 and --images 9: 1 GiB short"
    assert caused.reason == "with --tp 2 and --images 9: 1 GiB short"


def test_what_an_error_says_is_why_nothing_was_planned() -> None:
    none = not_planned(UsageError("no such option", hint="").message)
    assert (none.plan, none.fits, none.why_not) == (None, False, "no such option")
    assert first_fitting(none) is None


def test_of_remedies_the_first_that_makes_it_fit_is_told() -> None:
    plan = turbofit.plan("internvl2-1b", on="1xrtx3090")
    planned = Planned(plan=plan, verdict=Verdict(subject="M", why_not="short"))
    closer = Remedy(change="--images 1", effect="not enough alone: 2 GiB short")
    helps = fitting("2 x RTX 3090", "9 KV tokens")
    with_both = planned.with_remedies(first=(closer,), last=(helps,))
    assert with_both.document.remedies == (closer, *plan.remedies, helps)
    assert first_fitting(planned.with_remedies(last=(closer,))) == first_fitting(planned)
    assert helps.effect == "fits: 9 KV tokens"
