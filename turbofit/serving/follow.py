"""The life of a run: its engines serve; if memory runs out, a smaller plan starts instead."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

from turbofit.core.errors import OutOfMemoryError, TurbofitError
from turbofit.core.process.files import write_atomic
from turbofit.gateway.server import digest_of, keep_large_blocks
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.ladder import MOST_RUNGS, remember, rungs, table
from turbofit.serving.start import Start
from turbofit.serving.supervisor import StoppedError

if TYPE_CHECKING:
    import signal

    from turbofit.core.engine_end import End
    from turbofit.core.plan import Plan
    from turbofit.serving.ladder import Rung
    from turbofit.serving.run import Run
    from turbofit.serving.supervisor import StopSignal


def follow(run: Run, stop: StopSignal) -> signal.Signals:
    """Start a run's engines and serve, after `Run.begin`; returns the signal that ended it.

    Raises:
        TurbofitError: something other than a signal ended the run; the record says what.
    """
    assert run.plan is not None
    keep_large_blocks()  # before the first thread, which would have a heap of its own
    try:
        ended = _follow(run, run.plan, stop)
    except StoppedError as exc:
        run.record.change(state="ended", ended=exc.signal.name)
        raise
    finally:
        if run.config.pretend:
            # The twin can be made again; a timeline looks larger than the disk space that it takes.
            for room in (run.folder / "model", *run.folder.glob("pretend-*")):
                shutil.rmtree(room, ignore_errors=True)
    run.record.change(state="ended", ended=ended.name)
    return ended


def _follow(run: Run, plan: Plan, stop: StopSignal) -> signal.Signals:
    failed: list[tuple[Plan, End, str]] = []
    why = ""
    while True:
        start = Start(run, plan, len(failed))
        run.record.begin(
            number=len(failed), changes=run.changes, why=why, settings=plan.settings,
            requests_at_once=plan.requests_at_once,
        )  # fmt: skip
        try:
            return start.run(stop)
        except EndedError as exc:
            end = exc.end
            start.doubt(end)
        except TurbofitError as exc:
            run.record.change(state="failed", ended=exc.to_dict()["error"])
            raise
        run.record.attempt(ended=end.record())
        failed.append((plan, end, why))
        step = _step_down(run, plan, end, len(failed))
        if step is None:
            run.record.change(state="failed", ended=end.record())
            raise _final(run, failed)
        plan, rung = step
        run.changes, why = {**run.changes, **rung.changes}, rung.why
        place = f"warning: ladder {len(failed)}/{MOST_RUNGS}"
        run.say(f"{place}: {end.error.message}")
        run.say(f"{place}: {why}")
        version, pretend = run.lmdeploy.version, run.config.pretend
        remember(plan, version, pretend=pretend, changes=run.changes, why=why)
        with suppress(TurbofitError):  # on a full disk the file is missing
            path = run.folder / f"plan-{len(failed)}.json"
            write_atomic(path, plan.to_json(), mode=0o600)


def _step_down(run: Run, plan: Plan, end: End, failed: int) -> tuple[Plan, Rung] | None:
    """The first rung that leads to a different plan that fits, and this plan."""
    if run.config.plan is not None or not end.is_oom or failed > MOST_RUNGS:
        return None
    run.plan = None  # the plan before the change must not serve
    started = plan if end.group is None else plan.of_group(end.group)
    for rung in rungs(end, started, run.fixed):
        try:
            planned = run.planner.make({**run.changes, **rung.changes})
        except TurbofitError as exc:
            run.say(f"ladder: {rung.why}: {exc.message}")
            continue
        if not planned.fits:
            run.say(f"ladder: {rung.why}: {planned.verdict}")
        elif digest_of(planned) != digest_of(plan):
            return planned, rung
    return None


def _final(run: Run, failed: list[tuple[Plan, End, str]]) -> TurbofitError:
    """The last error; if memory ran out, the table of all starts is printed before."""
    end = failed[-1][1]
    if not end.is_oom or (len(failed) == 1 and end.kind == "hang"):
        return end.error
    for row in table(failed):
        run.say(row)
    if len(failed) == 1:
        return end.error
    return OutOfMemoryError(
        f"out of memory after {len(failed)} starts, the last: {end.error.message}",
        hint=f"see the table above, and {run.folder}; report it with turbofit diagnose",
    )
