"""The answer of `which`: the machines that keep a promise, and those that more GPUs outdo not."""

from __future__ import annotations

from typing import Any

from turbofit.core.units import GIB
from turbofit.planning.which import Serving, Which
from turbofit.report.painters.terminal import paint
from turbofit.report.views.preset_view import which_view


def row(gpus: int, **more: Any) -> Serving:
    return Serving(
        model="m", on=f"{gpus}xl4", gpus=gpus, bytes=24 << 30, keeps=True, engine="turbomind",
        tp=gpus, replicas=1, context=4096, kv_tokens=9, requests_at_once=8, **more,
    )  # fmt: skip


def test_the_short_answer_leaves_out_more_gpus_that_serve_no_more() -> None:
    rows = (row(1, warnings=("slow",)), row(2), row(4, requests_per_second=3.0))
    answer = Which(
        turbofit_version="0", created="", model="m", machine=None, counts=(1, 2, 4), keep=rows,
        request={"images": 2, "budget": 20 * GIB}, others=(row(8), row(9)),
    )  # fmt: skip
    short = paint(which_view(answer), short=True)
    assert "3 of 5 preset cards keep the promise (images 2, budget 20.0 GiB), each with" in short
    assert ["1xl4" in short, "2xl4" in short, "4xl4" in short] == [True, False, True]
    assert "warned of: 1xl4 (turbofit plan says why)" in short


def test_where_none_keeps_a_speed_the_nearest_are_shown() -> None:
    rows = [row(n, requests_per_second=speed) for n, speed in ((1, 1.0), (2, 9.0), (4, None))]
    answer = Which(
        turbofit_version="0", created="", model="m", machine=None, request={}, counts=(1, 2, 4),
        keep=(), others=(*rows, *(row(n) for n in (5, 6))),
    )  # fmt: skip
    lines = paint(which_view(answer), short=True).splitlines()
    assert [line.split()[1] for line in lines if "xl4:" in line] == ["2xl4:", "1xl4:", "4xl4:"]
