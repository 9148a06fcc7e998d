"""``turbofit bench [URL]``: a load on any OpenAI-compatible server, and what it measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import FORMS, SERVER_OPTIONS, server_of
from turbofit.cli.options.fields import filled, options_of
from turbofit.cli.terminal.interrupt import INTERRUPTED
from turbofit.core.errors import UnservedError
from turbofit.core.process.progress import tell

if TYPE_CHECKING:
    from turbofit.load.result import LoadResult

__all__ = ["LOAD_OPTIONS", "bench", "show_load"]


def _load_options() -> list[Option]:
    from turbofit.load.spec import LoadSpec

    groups = {
        "requests": (
            "images", "image_size", "prompt_tokens", "prompt_spread", "shared_prefix",
            "output_tokens", "output_spread", "stop_early",
        ),
        "arrivals": ("concurrency", "rate", "evenly", "trace", "trace_speed"),
        "window": ("requests", "seconds", "warm_up", "silence", "timeout", "seed"),
    }  # fmt: skip
    return [
        option
        for group, fields in groups.items()
        for option in options_of(LoadSpec, fields, group=group)
    ]


LOAD_OPTIONS: Final = tuple(_load_options())


@command(
    *SERVER_OPTIONS[:1],
    *FORMS,
    Option("--html", metavar="FILE", type=PATH, form=True, help="one page; - for stdout"),
    *SERVER_OPTIONS[1:],
    *LOAD_OPTIONS,
    only_linux=True,
)
def bench(
    *,
    url: str | None,
    html: str | None,
    model: str | None,
    api_key: str | None,
    as_json: bool,
    md: bool,
    **given: Any,
) -> int:
    """Drive and show; 3 where nothing was answered, 130 where a signal ended it."""
    from turbofit.cli.terminal.output import say
    from turbofit.launch.serve.runs import requests_at, waiting_words
    from turbofit.load.bench import bench as measure
    from turbofit.load.spec import LoadSpec

    spec = filled(LoadSpec, given)
    address, key = server_of(url, api_key)
    waiting = waiting_words(spec.at_once or 0, requests_at(address))
    if waiting:
        say(waiting)
    result = measure(
        address,
        spec,
        key=key,
        model=model,
        tick=lambda run: tell(run.step()),
    )
    show_load(result, html, as_json=as_json, md=md)
    if not result.answered and result.begun:
        worst = result.errors[0]
        raise UnservedError(
            f"no request was answered: {worst.count} times {worst.kind}",
            hint=worst.example or "see what the server logs",
        )
    return INTERRUPTED if result.stopped.startswith("SIG") else 0


def show_load(result: LoadResult, html: str | None, *, as_json: bool, md: bool) -> None:
    """In the form that was asked for."""
    from turbofit.cli.terminal.output import show_form
    from turbofit.report.views.run.measured_view import load_view

    made = f"turbofit {result.turbofit_version}, measured {result.created}."
    show_form(result, load_view, as_json=as_json, md=md, html=html, made=made)
