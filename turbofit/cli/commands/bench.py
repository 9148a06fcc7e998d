"""``turbofit bench``: a load that is measured."""

from __future__ import annotations

from typing import Any, Final

from turbofit.cli.command import command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.terminal.interrupts import INTERRUPTED
from turbofit.cli.terminal.output import Form, complain
from turbofit.core.errors import UnservedError
from turbofit.core.process.progress import tell
from turbofit.measure.load.spec import LoadSpec

_LOAD_GROUPS: Final = {
    "requests": (
        "images", "image_size", "prompt_tokens", "shared_prefix", "output_tokens", "stop_early",
    ),
    "arrivals": ("concurrency", "rate"),
    "window": ("requests", "seconds", "warm_up", "timeout"),
}  # fmt: skip
LOAD_OPTIONS: Final = tuple(fields.grouped_options(LoadSpec, _LOAD_GROUPS))


@command(
    *common.SERVER_OPTIONS[:1],
    *common.FORMS,
    *common.SERVER_OPTIONS[1:],
    *LOAD_OPTIONS,
    only_linux=True,
)
def bench(
    *, url: str | None, model: str | None, api_key: str | None, form: Form, **given: Any
) -> int:
    """Drive a load and show it; exit 3 if nothing was answered, 130 if a signal ended it."""
    from turbofit.measure.load.bench import bench as measure
    from turbofit.report.views.measured_view import load_view

    spec = fields.filled(LoadSpec, given)
    address, key = common.server_of(url, api_key)
    result = measure(address, spec, key=key, model=model, tick=lambda run: tell(run.step()))
    form.show(result, load_view)
    if not result.answered and result.begun:
        worst = result.errors[0]
        error = UnservedError(
            f"no request was answered: {worst.count} times {worst.kind}",
            hint=worst.example or "see what the server logs",
        )
        complain(error.to_dict(), as_json=False)  # stdout has the document
        return error.exit_code
    return INTERRUPTED if result.stopped.startswith("SIG") else 0
