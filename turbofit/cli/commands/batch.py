"""``turbofit batch``: sends the requests of a file or folder until each is answered."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.batch_jobs.batch_input import BatchSpec
from turbofit.cli.command import PATH, Argument, command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.terminal.output import INTERRUPTED, Form, answer, complain, say
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.messages import counted, refuse_together
from turbofit.core.struct import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.batch_jobs.batch_job import BatchJob, BatchResult

_GROUPS: Final = {
    "items": ("prompt", "max_tokens"),
    "sending": ("concurrency", "timeout", "patience"),
}


@command(
    Argument("source", metavar="INPUT", type=PATH),
    Argument("output", metavar="OUTPUT", type=PATH),
    *fields.options_of(BatchSpec, ("url", "model")),
    common.API_KEY,
    common.JSON,
    *fields.grouped_options(BatchSpec, _GROUPS),
    only_linux=True,
    takes_rest=True,
    usage="INPUT OUTPUT (--url URL | --model MODEL [-- OPTIONS OF SERVE]) [OPTIONS]",
)
def batch(
    *,
    source: str,
    output: str,
    api_key: str | None,
    form: Form,
    rest: Sequence[str],
    **given: Any,
) -> int:
    """Send a batch and show the result; exit 3 if nothing was answered, 130 after a signal."""
    from turbofit.batch_jobs.batch_job import BatchJob

    spec = fields.filled(BatchSpec, given)
    if spec.url is None and spec.model is None:
        from turbofit.model.names import names_a_model

        model = shlex.quote(source) if names_a_model(source) else "MODEL"
        raise UsageError(
            "neither a server nor a model is named",
            hint=f"turbofit batch INPUT OUTPUT --model {model} starts a server, and --url "
            "http://127.0.0.1:23333 asks one that runs",
        )
    key = None
    if spec.url is None:
        refuse_together({"patience": spec.given().get("patience")}, "--model")
    else:
        address, key = common.server_of(spec.url, api_key)
        spec = spec.changed(url=address)
        if rest:
            raise UsageError(
                f"{rest[0]} is an option of a server that batch starts",
                hint=f"leave {rest[0]} out, or give --model instead of --url",
            )
    # Nobody waits for an answer of a batch: its memory is better used for more requests at once.
    if not any("prefix-caching" in word for word in rest):
        rest = ("--no-enable-prefix-caching", *rest)
    job = BatchJob(
        (Path(source), Path(output)), spec, key=key, words=(spec.model or "", *rest),
        say=(lambda _: None) if form.as_json else say,
    )  # fmt: skip
    result = asyncio.run(_stoppable(job))
    _show(result, form)
    if job.interrupted:
        return INTERRUPTED
    if result.items and not result.answered:
        error = UnservedError(
            f"no item was answered: {result.failed:,} failed",
            hint=f"see the error of each line of {result.output}",
        )
        complain(error.to_dict(), as_json=False)  # on stderr: stdout has the result already
        return error.exit_code
    return 0


async def _stoppable(job: BatchJob) -> BatchResult:
    """Run a job; SIGINT and SIGTERM cancel the job, which then returns its result."""
    from turbofit.core.process.signals import stop_signals

    loop, run = asyncio.get_running_loop(), asyncio.ensure_future(job.run())
    for number in stop_signals():
        loop.add_signal_handler(number, run.cancel)
    return await run


def _show(result: BatchResult, form: Form) -> None:
    """Say how many items have answers in all, what this command sent, and how many are left."""
    if form.as_json:
        answer(to_json(result))
        return
    sent = result.answered + result.failed - result.before  # now, not by an earlier command
    rate = f"{result.seconds:,.1f} s, {result.items_per_second:,.2f}/s"
    say(
        f"{result.output}: {result.answered:,} of {counted(result.items, 'item')} answered, "
        f"{result.failed:,} failed; {f'{sent:,} in {rate}' if sent else 'none was sent now'}"
    )
    if result.lowered:
        say(f"answers to requests that the server lowered: {result.lowered:,}")
    if result.left:
        say(f"not answered yet: {counted(result.left, 'item')}; run the same command to continue")
