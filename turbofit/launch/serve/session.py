"""One `turbofit serve` from its first plan to its end: attempts, and the ladder between them."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from turbofit.core.errors import DoesNotFitError, OutOfMemoryError, TurbofitError
from turbofit.core.process.files import write_atomic
from turbofit.core.units import format_bytes, mib
from turbofit.gateway.allocator import keep_large_blocks
from turbofit.launch.engine.engine_exit import EndedError
from turbofit.launch.serve import retry_memory
from turbofit.launch.serve.attempt import Attempt
from turbofit.launch.serve.ladder import MOST_RUNGS, merged, rungs
from turbofit.launch.serve.supervisor import StoppedError

if TYPE_CHECKING:
    import signal

    from turbofit.core.plan import Plan
    from turbofit.launch.serve.job import Job
    from turbofit.launch.serve.ladder import Rung
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.observe.ends import End

__all__ = ["run_session"]


def run_session(job: Job, plan: Plan, stop: StopSignal) -> signal.Signals:
    """Launch, and climb the ladder where memory runs out.

    Raises:
        TurbofitError: it ended otherwise than by a signal; the record says how.
    """
    keep_large_blocks()  # before the first thread, which would have a heap of its own
    try:
        return _climb(job, plan, stop)
    except StoppedError as exc:
        job.record.state("ended", ended=exc.signal.name)
        raise
    finally:
        if job.config.pretend:
            # The twin can be made again; a timeline's length is not its size, but looks like it.
            for room in (job.folder / "model", *job.folder.glob("pretend-*")):
                shutil.rmtree(room, ignore_errors=True)


def _climb(job: Job, plan: Plan, stop: StopSignal) -> signal.Signals:
    failed: list[tuple[Plan, End, str]] = []
    why, changes = "", dict(job.changes)
    while True:
        if failed:
            _keep(job, plan, len(failed))
        attempt = Attempt(job, plan, len(failed))
        job.record.begin(number=len(failed), changes=changes, why=why, **_facts(plan))
        try:
            with ExitStack() as stack:
                ended = attempt.run(stop, stack)
        except EndedError as exc:
            end = exc.ending
        except TurbofitError as exc:
            job.record.state("failed", ended=exc.to_dict()["error"])
            raise
        else:
            if changes and attempt.was_ready:
                _remember(job, plan, changes, why)
            job.record.state("ended", ended=ended.name)
            return ended
        job.record.attempt(ended=end.record(), ended_at=time.strftime("%H:%M:%S"))
        failed.append((plan, end, why))
        step = _next(job, plan, end, changes, len(failed))
        if step is None:
            job.record.state("failed", ended=end.record())
            raise _final(job, failed)
        plan, rung = step
        changes, why = merged(changes, rung), rung.why
        rungs = f"warning: ladder {len(failed)}/{MOST_RUNGS}"
        job.say(f"{rungs}: {end.error.message}")
        job.say(f"{rungs}: {why}")
        _remember(job, plan, changes, why)


def _remember(job: Job, plan: Plan, changes: dict[str, Any], why: str) -> None:
    """Keep what made the plan start, for the next run of this kind."""
    version, pretend = job.lmdeploy.version, job.config.pretend
    retry_memory.remember(plan, version, pretend=pretend, changes=changes, why=[why])


def _next(
    job: Job, plan: Plan, end: End, changes: dict[str, Any], failed: int
) -> tuple[Plan, Rung] | None:
    """The next rung that the planner can make a plan of, and that is another one."""
    if job.replan is None or not end.is_oom or failed > MOST_RUNGS:
        return None
    started = plan if end.group is None else plan.of_group(end.group)
    for rung in rungs(end, started, job.fixed):
        options = merged(changes, rung)
        try:
            planned = job.replan(options)
        except TurbofitError as exc:
            job.say(f"ladder: {rung.why}: {exc.message}")
            continue
        if not planned.fits:
            job.say(f"ladder: {rung.why}: {planned.verdict}")
        elif _engines(planned) != _engines(plan):
            return planned, rung
    return None


def _engines(plan: Plan) -> tuple[object, ...]:
    """All that its engines are started with and held to."""
    groups = [(one.settings, one.units_per_forward) for one in plan.by_group]
    return plan.settings, plan.limits, groups


def _final(job: Job, failed: list[tuple[Plan, End, str]]) -> TurbofitError:
    """The last error, with the table of all attempts before it where there were several."""
    end = failed[-1][1]
    if not end.is_oom:
        return end.error
    if len(failed) == 1 and isinstance(end.error, DoesNotFitError):
        return end.error
    for line in _table(failed):
        job.say(line)
    if len(failed) == 1:
        return end.error
    return OutOfMemoryError(
        f"out of memory after {len(failed)} starts, the last: {end.error.message}",
        hint=f"see the table above, and {job.folder}; report it with turbofit diagnose",
    )


def _table(failed: list[tuple[Plan, End, str]]) -> list[str]:
    """Forecast beside measured, a line a start."""
    lines = ["start  ratio  prefill  forecast peak (headroom)       ended: asked / left"]
    for number, (plan, end, why) in enumerate(failed):
        started = plan if end.group is None else plan.of_group(end.group)
        gpu = min(started.gpus, key=lambda one: one.headroom)
        settings = started.settings
        requested = "?" if end.asked is None else mib(end.asked)
        left = "?" if end.left is None else mib(end.left)
        lines.append(
            f"{number:5}  {settings.cache_max_entry_count:.3f}  "
            f"{settings.max_prefill_token_num:7}  {mib(gpu.peak):>9} MiB "
            f"({format_bytes(gpu.headroom)})   {end.phase or end.kind}: {requested} / {left} MiB"
            f"{f'  [{why}]' if why else ''}"
        )
    return lines


def _keep(job: Job, plan: Plan, number: int) -> None:
    """Another attempt's plan, beside that of the first; a full disk costs the file."""
    with suppress(TurbofitError):
        write_atomic(job.folder / f"plan-{number}.json", plan.to_json(), mode=0o600)


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "settings": plan.settings,
        "by_group": tuple(group.settings for group in plan.by_group),
        "groups": plan.parallel.groups,
        "limits": plan.limits,
        "forecast": tuple(
            {
                "gpu": gpu.index, "steady": gpu.steady, "peak": gpu.peak,
                "load_peak": gpu.load_peak, "headroom": gpu.headroom, "margin": gpu.margin,
            }
            for gpu in plan.gpus
        ),
    }  # fmt: skip
