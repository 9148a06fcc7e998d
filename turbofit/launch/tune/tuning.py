"""The tuning itself: trials one after the other, until nothing promises more or the time is up."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.process.progress import under_way
from turbofit.core.tuning import CurvePoint, EarlierTuning, SpeedFactor, TrialRecord, Tuning
from turbofit.core.version import __version__
from turbofit.launch.tune.runner import TrialEnd, figures_of
from turbofit.launch.tune.search import TrialSearch
from turbofit.launch.tune.slo import meets
from turbofit.observe.tuned import plain

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Goal, Plan
    from turbofit.launch.tune.journal import Journal
    from turbofit.launch.tune.space import TrialChoice
    from turbofit.load.spec import LoadSpec

__all__ = ["TuneTask", "tune"]

#: Seconds of each point of the curve.
_CURVE_SECONDS: Final = 8.0
_SHOWN: Final = 120


class TuneTask(NamedTuple):
    """What is tuned.

    ``facts`` are the fields of the result that are known before: of the model, machine and promise.
    ``budget`` in seconds bounds all trials of all runs; None is no bound.
    """

    choices: Sequence[TrialChoice]
    load: LoadSpec
    at_once: int
    goal: Goal
    slo: dict[str, float]
    budget: float | None
    starts: int
    facts: dict[str, Any]
    earlier: Tuning | None


def tune(
    task: TuneTask,
    journal: Journal,
    plan_of: Callable[[Options], Plan],
    run: Callable[[Plan, Sequence[LoadSpec]], TrialEnd],
    say: Callable[[str], None],
) -> Tuning | signal.Signals:
    """Try, and keep the best.

    Args:
        task: what is tuned.
        journal: what earlier runs of the same tuning have tried.
        plan_of: plans options again, on the machine as it is now.
        run: starts a plan's engines and drives loads.
        say: takes lines of progress.

    Returns:
        The result, or the signal that ended it; the journal then has all that was tried.
    """
    search, stopped = _resumed(task, journal), ""
    while not stopped:
        stopped = _enough(task, journal)
        index = None if stopped else search.next()
        if index is None:
            stopped = stopped or "no other settings promise more"
            break
        ended = _try(task, journal, index, plan_of, run, say)
        if ended is not None:
            return ended
        last = journal.trials[-1]
        search.tell(index, last.measured)
    best = search.best()
    number = None if best is None else _number(task, journal, best)
    result = _result(task, journal, number, stopped)
    if result.winner is None or len(journal.trials) >= task.starts or _over(task, journal):
        return result
    return _confirmed(task, result, plan_of, run, say)


def _resumed(task: TuneTask, journal: Journal) -> TrialSearch:
    search = TrialSearch(
        [one.option for one in task.choices], task.slo, latency=task.goal == "latency",
        at_once=task.at_once,
    )  # fmt: skip
    for trial in journal.trials:
        for index, choice in enumerate(task.choices):
            if choice.options == trial.options:
                search.tell(index, trial.measured)
    return search


def _number(task: TuneTask, journal: Journal, index: int) -> int:
    options = task.choices[index].options
    return next(one.number for one in journal.trials if one.options == options)


def _enough(task: TuneTask, journal: Journal) -> str:
    """Why nothing more is tried; empty while the search goes on."""
    # The last start confirms the best, and measures its curve.
    if len(journal.trials) >= max(1, task.starts - 1):
        return f"{len(journal.trials)} settings were tried"
    return "the time is up" if _over(task, journal) else ""


def _over(task: TuneTask, journal: Journal) -> bool:
    """Whether another trial, as long as those so far, would end after the budget."""
    if task.budget is None or not journal.trials:
        return False
    longest = max(one.seconds for one in journal.trials)
    return journal.seconds + longest > task.budget


def _try(
    task: TuneTask,
    journal: Journal,
    index: int,
    plan_of: Callable[[Options], Plan],
    run: Callable[[Plan, Sequence[LoadSpec]], TrialEnd],
    say: Callable[[str], None],
) -> signal.Signals | None:
    """One trial, which the journal keeps; the signal where one ended it."""
    choice, number = task.choices[index], len(journal.trials) + 1
    say(f"trial {number}: {_told(choice)}")
    begun = time.monotonic()
    try:
        plan = plan_of(choice.options)
        if not plan.fits:
            end = TrialEnd((), "unserved", plan.verdict, None, 0.0)
        else:
            with under_way(f"trial {number} of at most {task.starts}"):
                end = run(plan, [task.load])
    except TurbofitError as exc:
        end = TrialEnd((), "unserved", exc.message, None, round(time.monotonic() - begun, 1))
    if end.signal is not None:
        return end.signal
    trial = _record(task, choice, number, end)
    journal.add(trial)
    if trial.measured is None:
        say(f"trial {number}: {trial.outcome}: {trial.why[:_SHOWN]}")
    else:
        keeps = "" if trial.meets_slo else ", which misses the SLO"
        say(
            f"trial {number}: {trial.measured.requests_per_second:.2f} requests/s, forecast "
            f"{trial.forecast.requests_per_second:.2f}{keeps}"
        )
    return None


def _told(choice: TrialChoice) -> str:
    plan, settings = choice.plan, choice.plan.settings
    kv = f", KV int{settings.quant_policy}" if settings.quant_policy else ""
    prefix = ", prefix caching" if settings.enable_prefix_caching else ""
    return (
        f"{plan.engine.name}, tp {plan.parallel.tp} x {plan.parallel.replicas}, batch "
        f"{settings.max_batch_size}, prefill {settings.max_prefill_token_num}{kv}{prefix}"
    )


def _record(task: TuneTask, choice: TrialChoice, number: int, end: TrialEnd) -> TrialRecord:
    plan, settings = choice.plan, choice.plan.settings
    measured = figures_of(end.results[0]) if end.outcome == "measured" else None
    return TrialRecord(
        number=number,
        options=choice.options,
        engine=plan.engine.name,
        tp=plan.parallel.tp,
        replicas=plan.parallel.replicas,
        max_batch_size=settings.max_batch_size,
        max_prefill_token_num=settings.max_prefill_token_num,
        quant_policy=settings.quant_policy,
        enable_prefix_caching=settings.enable_prefix_caching,
        kv_tokens=plan.kv.total_tokens,
        forecast=choice.option.forecast,
        outcome=end.outcome,
        why=end.why,
        measured=measured,
        meets_slo=measured is not None and meets(measured, task.slo),
        seconds=end.seconds,
    )


def _result(task: TuneTask, journal: Journal, best: int | None, stopped: str) -> Tuning:
    result = Tuning(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=plain(task.load.given()),
        goal=task.goal,
        slo=task.slo,
        best=best,
        trials=journal.trials,
        factors=_factors(journal.trials),
        stopped=stopped,
        seconds=round(journal.seconds, 1),
        **task.facts,
    )
    return replace(result, earlier=_earlier(result, task.earlier))


def _confirmed(
    task: TuneTask,
    result: Tuning,
    plan_of: Callable[[Options], Plan],
    run: Callable[[Plan, Sequence[LoadSpec]], TrialEnd],
    say: Callable[[str], None],
) -> Tuning | signal.Signals:
    """Measure the best once more, and under other numbers of requests at once: the curve."""
    winner = result.winner
    assert winner is not None
    loads = _curve_loads(task)
    if not loads:
        return result
    say(f"the best is trial {winner.number}: its curve")
    try:
        plan = plan_of(dict(winner.options))
        with under_way("the curve of the best"):
            end = run(plan, [load for _, load in loads]) if plan.fits else None
    except TurbofitError as exc:
        say(f"no curve: {exc.message}")
        return result
    if end is None:
        return result
    if end.signal is not None:
        return end.signal
    points = [
        CurvePoint(concurrency=at, measured=figures_of(one))
        for (at, _), one in zip(loads, end.results, strict=False)
    ]
    if end.outcome != "measured":
        say(f"the curve ends early: {end.why[:_SHOWN]}")
    return replace(result, curve=tuple(points), seconds=round(result.seconds + end.seconds, 1))


def _curve_loads(task: TuneTask) -> list[tuple[int, LoadSpec]]:
    """Closed loops of 1, 4, 16, … requests; none for an open loop or a trace."""
    if task.load.at_once is None:
        return []
    places = {4**power for power in range(8) if 4**power < task.at_once} | {task.at_once}
    seconds = min(_CURVE_SECONDS, task.load.measured_seconds or _CURVE_SECONDS)
    return [
        (at, task.load.changed(concurrency=at, seconds=seconds, requests=None, warm_up=at))
        for at in sorted(places)
    ]


def _factors(trials: Sequence[TrialRecord]) -> tuple[SpeedFactor, ...]:
    """Measured over forecast of each engine: the geometric mean of its trials."""
    logs: dict[str, list[float]] = {}
    for one in trials:
        if one.measured is not None and one.measured.requests_per_second > 0:
            ratio = one.measured.requests_per_second / one.forecast.requests_per_second
            logs.setdefault(one.engine, []).append(math.log(ratio))
    return tuple(
        SpeedFactor(
            engine=engine,
            factor=round(math.exp(sum(found) / len(found)), 4),
            trials=len(found),
        )
        for engine, found in sorted(logs.items())
    )


def _earlier(result: Tuning, before: Tuning | None) -> EarlierTuning | None:
    """Results of another LMDeploy under the same load."""
    if before is None or before.winner is None or result.winner is None:
        return None
    then, now = before.winner.measured, result.winner.measured
    if then is None or now is None or then.requests_per_second <= 0:
        return None
    return EarlierTuning(
        lmdeploy=before.lmdeploy,
        created=before.created,
        requests_per_second=then.requests_per_second,
        change=round(now.requests_per_second / then.requests_per_second - 1, 4),
    )
