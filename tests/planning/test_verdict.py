"""What planners find: one sentence of each case."""

from __future__ import annotations

from turbofit.planning.verdict import Verdict


def test_a_verdict_says_whether_it_fits_and_why_not_with_its_causes() -> None:
    assert Verdict(subject="M", found="on GPU 0: 3 requests").text == "fits: M on GPU 0: 3 requests"
    short = Verdict(subject="M", problem="1 GiB short")
    assert (short.fits, short.text) == (False, "does not fit: M: 1 GiB short")
    caused = Verdict(subject="M", problem="1 GiB short", causes=("--tp 2", "--images 9"))
    assert caused.text == "does not fit: M with --tp 2 and --images 9: 1 GiB short"
    assert caused.reason == "with --tp 2 and --images 9: 1 GiB short"
