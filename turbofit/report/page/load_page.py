"""The page of a load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.report.page.blocks import paint
from turbofit.report.page.curve import Series, curve
from turbofit.report.page.frame import framed, tiles
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.views.run.load_view import error_blocks, latency_table, load_text, seconds_text

if TYPE_CHECKING:
    from turbofit.load.result import LoadResult

__all__ = ["load_page"]


def load_page(result: LoadResult) -> str:
    """A load as HTML."""
    parts = [
        ("latency", "Latency", paint([latency_table(result)])),
        ("time", "Over the time of the window", _moments(result)),
        ("errors", "Requests without an answer", paint(error_blocks(result))),
        ("warnings", "Warnings", _warnings(result)),
    ]
    return framed(
        title=f"{result.model} under load - turbofit",
        head=_head(result),
        sections=[part for part in parts if part[2]],
        made=f"turbofit {result.turbofit_version}, measured {result.created}.",
        document=result,
    )


def _head(result: LoadResult) -> Markup:
    failed = result.begun - result.answered
    return join(
        tag("h1", result.model, tag("small", f" at {result.url}")),
        tag("p", load_text(result), class_="verdict"),
        tiles(
            [
                ("requests/s", f"{result.requests_per_second:.2f}",
                 f"{result.answered:,} answered in {result.seconds:,.0f} s, {failed:,} not"),
                ("tokens/s", f"{result.output_tokens_per_second:,.0f}",
                 f"{result.output_tokens:,.0f} an answer, {result.running:.1f} requests at once"),
                ("first token, median", seconds_text(result.ttft.p50),
                 f"p99 {seconds_text(result.ttft.p99)}"),
                ("a token, median", seconds_text(result.tpot.p50),
                 f"p99 {seconds_text(result.tpot.p99)}"),
            ]
        ),
    )  # fmt: skip


def _moments(result: LoadResult) -> Markup:
    moments = result.moments
    rate = tuple((one.at, one.output_tokens_per_second) for one in moments)
    running = tuple((one.at, one.running) for one in moments)
    return join(
        curve([Series("tokens/s", rate)], x="seconds", y="tokens a second"),
        curve([Series("requests", running)], x="seconds", y="requests under way"),
    )


def _warnings(result: LoadResult) -> Markup:
    if not result.warnings:
        return Markup()
    return tag("ul", *(tag("li", text) for text in result.warnings), class_="warn")
