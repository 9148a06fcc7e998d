"""``turbofit bench`` and ``batch``: a load that is measured, and requests that need answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.batch.batch_spec import LAUNCH_OPTIONS, BatchSpec, target_of
from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.terminal.interrupts import INTERRUPTED
from turbofit.cli.terminal.output import Form, answer, complain, say
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.process.progress import tell
from turbofit.core.struct import to_json
from turbofit.load.spec import LoadSpec
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from turbofit.batch.batch_job import BatchJob, BatchResult

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
    from turbofit.launch.serve.runs import requests_at, waiting_words
    from turbofit.load.bench import bench as measure
    from turbofit.report.views.measured_view import load_view

    spec = fields.filled(LoadSpec, given)
    address, key = common.server_of(url, api_key)
    waiting = waiting_words(spec.at_once or 0, requests_at(address))
    if waiting:
        say(waiting)
    result = measure(address, spec, key=key, model=model, tick=lambda run: tell(run.step()))
    form.show(result, load_view)
    if not result.answered and result.begun:
        worst = result.errors[0]
        return _unserved(
            f"no request was answered: {worst.count} times {worst.kind}",
            worst.example or "see what the server logs",
        )
    return INTERRUPTED if result.stopped.startswith("SIG") else 0


def _unserved(message: str, hint: str) -> int:
    """Return the exit code; the reason goes only to stderr, since stdout has the document."""
    error = UnservedError(message, hint=hint)
    complain(error.to_dict(), as_json=False)
    return error.exit_code


_TABLES: Final = frozenset({".csv", ".ods", ".parquet", ".tsv", ".xls", ".xlsx"})
_BATCH_GROUPS: Final = {
    "items": ("prompt", "image_column", "max_tokens"),
    "output": ("retry_failed",),
    "sending": ("timeout", "patience"),
    "launch": LAUNCH_OPTIONS,
}


@command(
    Argument("source", metavar="INPUT", type=PATH),
    Argument("output", metavar="OUTPUT", type=PATH),
    Option("--url", metavar="URL"),
    Option("--model", shell_complete=fields.complete_model),
    common.API_KEY,
    Option("--revision"),
    common.JSON,
    *fields.grouped_options(BatchSpec, _BATCH_GROUPS),
    *common.machine_options(),
    *common.planning_options(),
    only_linux=True,
    usage="INPUT OUTPUT (--url URL | --model MODEL) [OPTIONS]",
)
def batch(
    *,
    source: str,
    output: str,
    url: str | None,
    model: str | None,
    api_key: str | None,
    form: Form,
    **given: Any,
) -> int:
    """Send a batch and show the result; exit 3 if nothing was answered, 130 after a signal."""
    from turbofit.batch.batch_job import BatchJob

    if (kind := Path(output).suffix.lower()) in _TABLES:
        hint = f"name {Path(output).with_suffix('.jsonl')}: a line of JSON an item"
        raise UsageError(f"{output}: answers are written as JSONL, not as {kind}", hint=hint)
    spec = fields.filled(BatchSpec, given)
    request = fields.filled(PlanRequest, {**given, "model": model or ""})
    target = target_of(url, api_key, request)
    paths = Path(source), Path(output)
    job = BatchJob(paths, spec, target, say=(lambda _: None) if form.as_json else say)
    result = asyncio.run(_stoppable(job))
    _show_batch(result, form)
    if job.interrupted:
        return INTERRUPTED
    if result.items and not result.answered:
        return _unserved(
            f"no item was answered: {result.failed:,} failed",
            f"see the error of each line of {result.output}",
        )
    return 0


async def _stoppable(job: BatchJob) -> BatchResult:
    from turbofit.core.process.signals import stop_signals

    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, job.stop)
    return await job.run()


def _show_batch(result: BatchResult, form: Form) -> None:
    if form.as_json:
        answer(to_json(result))
        return
    sent = result.answered + result.failed - result.before
    rate = f"{result.seconds:,.1f} s, {result.items_per_second:,.2f}/s"
    say(
        f"{result.output}: {result.answered:,} of {result.items:,} items answered, "
        f"{result.failed:,} failed; {f'{sent:,} in {rate}' if sent else 'none was sent now'}"
    )
    if result.lowered:
        say(f"{result.lowered:,} answers are to requests that the server lowered")
    if result.left:
        say(f"{result.left:,} items are left: the same command goes on from here")
