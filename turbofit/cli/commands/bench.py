"""``turbofit bench [URL]``: a load on any OpenAI-compatible server, and what it measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import command
from turbofit.cli.options.common_options import (
    FORMS,
    HTML,
    SERVER_OPTIONS,
    filled,
    grouped_options,
    server_of,
)
from turbofit.cli.terminal.output import INTERRUPTED, complain, say
from turbofit.core.errors import UnservedError
from turbofit.core.process.progress import tell
from turbofit.load.spec import LoadSpec

if TYPE_CHECKING:
    from turbofit.cli.terminal.output import Form
    from turbofit.load.result import LoadResult

_GROUPS: Final = {
    "requests": (
        "images", "image_size", "prompt_tokens", "prompt_spread", "shared_prefix",
        "output_tokens", "output_spread", "stop_early",
    ),
    "arrivals": ("concurrency", "rate", "evenly", "trace", "trace_speed"),
    "window": ("requests", "seconds", "warm_up", "silence", "timeout", "seed"),
}  # fmt: skip
LOAD_OPTIONS: Final = tuple(grouped_options(LoadSpec, _GROUPS))


@command(
    *SERVER_OPTIONS[:1],
    *FORMS,
    HTML,
    *SERVER_OPTIONS[1:],
    *LOAD_OPTIONS,
    only_linux=True,
)
def bench(
    *, url: str | None, model: str | None, api_key: str | None, form: Form, **given: Any
) -> int:
    """Drive and show; 3 where nothing was answered, 130 where a signal ended it."""
    from turbofit.launch.serve.runs import requests_at, waiting_words
    from turbofit.load.bench import bench as measure

    spec = filled(LoadSpec, given)
    address, key = server_of(url, api_key)
    waiting = waiting_words(spec.at_once or 0, requests_at(address))
    if waiting:
        say(waiting)
    result = measure(address, spec, key=key, model=model, tick=lambda run: tell(run.step()))
    show_load(result, form)
    if not result.answered and result.begun:
        worst = result.errors[0]
        error = UnservedError(
            f"no request was answered: {worst.count} times {worst.kind}",
            hint=worst.example or "see what the server logs",
        )
        complain(error.to_dict(), as_json=False)  # stdout has its document
        return error.exit_code
    return INTERRUPTED if result.stopped.startswith("SIG") else 0


def show_load(result: LoadResult, form: Form) -> None:
    from turbofit.report.views.measured_view import load_view

    footer = f"turbofit {result.turbofit_version}, measured {result.created}."
    form.show(result, load_view, footer)
