"""``turbofit batch INPUT OUTPUT``: a file or a folder of requests, until each has its line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.batch.batch_spec import LAUNCH_OPTIONS, BatchSpec, target_of
from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.commands.completion import complete_model
from turbofit.cli.options.common_options import (
    API_KEY,
    JSON,
    filled,
    grouped_options,
    machine_options,
    planning_options,
)
from turbofit.cli.terminal.output import INTERRUPTED, answer, say
from turbofit.core.errors import UnservedError, UsageError

if TYPE_CHECKING:
    from turbofit.batch.batch_job import BatchJob, BatchResult
    from turbofit.cli.terminal.output import Form

_TABLES: Final = frozenset({".csv", ".ods", ".parquet", ".tsv", ".xls", ".xlsx"})
_GROUPS: Final = {
    "items": ("prompt", "image_column", "max_tokens"),
    "output": ("retry_failed",),
    "sending": ("timeout", "patience"),
    "launch": LAUNCH_OPTIONS,
}


@command(
    Argument("source", metavar="INPUT", type=PATH),
    Argument("output", metavar="OUTPUT", type=PATH),
    Option("--url", metavar="URL"),
    Option("--model", shell_complete=complete_model),
    API_KEY,
    Option("--revision"),
    JSON,
    *grouped_options(BatchSpec, _GROUPS),
    *machine_options(),
    *planning_options(),
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
    """Send and show; 3 where nothing was answered, 130 where a signal ended it."""
    from turbofit.batch.batch_job import BatchJob
    from turbofit.planning.request import PlanRequest

    if (kind := Path(output).suffix.lower()) in _TABLES:
        hint = f"name {Path(output).with_suffix('.jsonl')}: a line of JSON an item"
        raise UsageError(f"{output}: answers are written as JSONL, not as {kind}", hint=hint)
    spec = filled(BatchSpec, given)
    request = filled(PlanRequest, {**given, "model": model or ""})
    target = target_of(url, api_key, request)
    tell = (lambda _: None) if form.as_json else say
    job = BatchJob((Path(source), Path(output)), spec, target, say=tell)
    result = asyncio.run(_stoppable(job))
    _show(result, form)
    if job.interrupted:
        return INTERRUPTED
    if result.items and not result.answered:
        raise UnservedError(
            f"no item was answered: {result.failed:,} failed",
            hint=f"see the error of each line of {result.output}",
        )
    return 0


async def _stoppable(job: BatchJob) -> BatchResult:
    from turbofit.core.process.signals import stop_signals

    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, job.stop)
    return await job.run()


def _show(result: BatchResult, form: Form) -> None:
    if form.as_json:
        from turbofit.core.struct import to_json

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
