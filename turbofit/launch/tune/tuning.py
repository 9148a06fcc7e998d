"""The tuning itself: trials one after the other, until nothing promises more or the time is up."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, part_of
from turbofit.core.process.state import state_dir
from turbofit.core.struct import Struct, const, to_json
from turbofit.core.tuning import CurvePoint, EarlierTuning, SpeedFactor, TrialRecord, Tuning
from turbofit.core.units import format_duration
from turbofit.core.version import __version__
from turbofit.launch.tune.runner import TrialEnd, figures_of
from turbofit.launch.tune.search import TrialSearch
from turbofit.launch.tune.slo import meets
from turbofit.observe.tuned import plain

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Goal, Plan
    from turbofit.launch.tune.space import TrialChoice
    from turbofit.load.spec import LoadSpec

__all__ = ["Journal", "Tools", "TuneTask", "tune"]

#: Seconds of each point of the curve.
_CURVE_SECONDS: Final = 8.0
_SHOWN: Final = 120


class TuneTask(NamedTuple):
    """What is tuned.

    ``facts`` are the fields of the result that are known before: of the model, machine and promise.
    ``time`` in seconds bounds all trials of all runs; None is no bound.
    """

    choices: Sequence[TrialChoice]
    load: LoadSpec
    at_once: int
    goal: Goal
    slo: dict[str, float]
    time: float | None
    starts: int
    facts: dict[str, Any]
    earlier: Tuning | None


class Tools(NamedTuple):
    """What a tuning works with.

    ``plan_of`` plans options again, on the machine as it is now; ``run`` starts a plan's engines
    and drives loads, for so many seconds at most; ``say`` takes lines of progress.
    """

    plan_of: Callable[[Options], Plan]
    run: Callable[[Plan, Sequence[LoadSpec], float | None], TrialEnd]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic


class _Clock:
    """The time that is left of a tuning, of which earlier runs have spent some."""

    def __init__(self, task: TuneTask, journal: Journal, now: Callable[[], float]) -> None:
        self._now, self._journal = now, journal
        self._ends = None if task.time is None else now() + task.time - journal.seconds

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no limit."""
        return None if self._ends is None else self._ends - self._now()

    @property
    def over(self) -> bool:
        """Whether another trial, as long as those so far, would be cut short."""
        longest = max((one.seconds for one in self._journal.trials), default=0.0)
        return self.left is not None and self.left < longest

    def whole(self, what: str) -> Callable[[], Step]:
        """What the steps of a trial are a part of, with the time that is left."""

        def told() -> Step:
            left = self.left
            detail = "" if left is None else f"{format_duration(max(left, 0.0))} of --time left"
            return Step(what, detail=detail)

        return told


def tune(task: TuneTask, journal: Journal, tools: Tools) -> Tuning | signal.Signals:
    """Try, and keep the best.

    Args:
        task: what is tuned.
        journal: what earlier runs of the same tuning have tried.
        tools: what does the work.

    Returns:
        The result, or the signal that ended it; the journal then has all that was tried. A trial
        that was cut short is none of the journal's, and the best only where nothing else was
        measured.
    """
    search, stopped, clock = _resumed(task, journal), "", _Clock(task, journal, tools.clock)
    cut: TrialRecord | None = None
    while not stopped:
        stopped = _enough(task, journal, clock)
        index = None if stopped else search.next()
        if index is None:
            stopped = stopped or "no other settings promise more"
            break
        tried = _try(task, journal, index, tools, clock)
        if not isinstance(tried, TrialRecord):
            return tried
        if tried.outcome == "cut":
            cut, stopped = tried, f"the time is up: trial {tried.number} was ended"
            break
        journal.add(tried)
        search.tell(index, tried.measured)
    best = search.best()
    number = None if best is None else _number(task, journal, best)
    if number is None and cut is not None and cut.meets_slo:
        number = cut.number
    result = _result(task, (*journal.trials, *filter(None, (cut,))), number, stopped)
    if cut or result.winner is None or len(journal.trials) >= task.starts or clock.over:
        return result
    return _confirmed(task, result, tools, clock)


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


def _enough(task: TuneTask, journal: Journal, clock: _Clock) -> str:
    """Why nothing more is tried; empty while the search goes on."""
    # The last start confirms the best, and measures its curve.
    if len(journal.trials) >= max(1, task.starts - 1):
        return f"{len(journal.trials)} settings were tried"
    return "the time is up" if journal.trials and clock.over else ""


def _try(
    task: TuneTask, journal: Journal, index: int, tools: Tools, clock: _Clock
) -> TrialRecord | signal.Signals:
    """One trial, or the signal that ended it."""
    choice, number = task.choices[index], len(journal.trials) + 1
    tools.say(f"trial {number}: {_told(choice)}")
    begun = tools.clock()
    try:
        plan = tools.plan_of(choice.options)
        if not plan.fits:
            end = TrialEnd((), "unserved", plan.verdict, None, 0.0)
        else:
            with part_of(clock.whole(f"trial {number} of at most {task.starts}")):
                end = tools.run(plan, [task.load], clock.left)
    except TurbofitError as exc:
        end = TrialEnd((), "unserved", exc.message, None, round(tools.clock() - begun, 1))
    if end.signal is not None:
        return end.signal
    trial = _record(task, choice, number, end)
    if trial.measured is None:
        tools.say(f"trial {number}: {trial.outcome}: {trial.why[:_SHOWN]}")
    else:
        keeps = "" if trial.meets_slo else ", which misses the SLO"
        part = f"; {trial.why}" if trial.outcome == "cut" else ""
        tools.say(
            f"trial {number}: {trial.measured.requests_per_second:.2f} requests/s, forecast "
            f"{trial.forecast.requests_per_second:.2f}{keeps}{part}"
        )
    return trial


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
    told = end.outcome in ("measured", "cut") and end.results
    measured = figures_of(end.results[0]) if told else None
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


def _result(
    task: TuneTask, trials: tuple[TrialRecord, ...], best: int | None, stopped: str
) -> Tuning:
    result = Tuning(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=plain(task.load.given()),
        goal=task.goal,
        slo=task.slo,
        best=best,
        trials=trials,
        factors=_factors(trials),
        stopped=stopped,
        seconds=round(sum(one.seconds for one in trials), 1),
        **task.facts,
    )
    return replace(result, earlier=_earlier(result, task.earlier))


def _confirmed(
    task: TuneTask, result: Tuning, tools: Tools, clock: _Clock
) -> Tuning | signal.Signals:
    """Measure the best once more, and under other numbers of requests at once: the curve."""
    winner = result.winner
    assert winner is not None
    loads = _curve_loads(task)
    if not loads:
        return result
    tools.say(f"the best is trial {winner.number}: its curve")
    try:
        plan = tools.plan_of(dict(winner.options))
        if not plan.fits:
            return result
        with part_of(clock.whole("the curve of the best")):
            end = tools.run(plan, [load for _, load in loads], clock.left)
    except TurbofitError as exc:
        tools.say(f"no curve: {exc.message}")
        return result
    if end.signal is not None:
        return end.signal
    points = [
        CurvePoint(concurrency=at, measured=figures_of(one))
        for (at, _), one in zip(loads, end.results, strict=False)
        if not one.stopped
    ]
    if end.outcome != "measured":
        tools.say(f"the curve ends early: {end.why[:_SHOWN]}")
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
        whole = one.outcome == "measured"
        if whole and one.measured is not None and one.measured.requests_per_second > 0:
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


# How far a tuning has come, on disk after every trial; of one model, promise, load and machine.


_SCHEMA: Final = "turbofit.tuning/1"


class _Pages(Struct):
    schema: Annotated[str, const(_SCHEMA)] = _SCHEMA
    seconds: float = 0.0
    trials: tuple[TrialRecord, ...] = ()


class Journal:
    """The trials so far.

    Args:
        key: of what is tuned.
        pretend: whether the GPUs are; such tunings are kept apart.
    """

    def __init__(self, key: str, *, pretend: bool) -> None:
        self._room, self._name = "tuning-pretend" if pretend else "tuning", f"{key}.json"
        pages = _Pages()
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            read = msgspec.json.decode(self._path(make=False).read_bytes(), type=_Pages)
            pages = read if read.schema == _SCHEMA else pages
        #: Seconds that earlier runs have spent.
        self.seconds, self.trials = pages.seconds, pages.trials

    def add(self, trial: TrialRecord) -> None:
        """Keep a trial."""
        self.trials = (*self.trials, trial)
        self.seconds += trial.seconds
        # A folder that cannot be written costs what could be resumed, never the run.
        with suppress(OSError, UsageError):
            pages = _Pages(seconds=self.seconds, trials=self.trials)
            write_atomic(self._path(), to_json(pages), mode=0o600)

    def forget(self) -> None:
        """Drop it."""
        with suppress(OSError):
            self._path(make=False).unlink()
        self.seconds, self.trials = 0.0, ()

    def _path(self, *, make: bool = True) -> Path:
        return state_dir(self._room, make=make) / self._name
