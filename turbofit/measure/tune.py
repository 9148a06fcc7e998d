"""`turbofit tune`: chooses settings, measures each under a load, and keeps the best."""

from __future__ import annotations

import math
import time
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.messages import counted
from turbofit.core.process.progress import under_way
from turbofit.core.process.signals import StoppedError
from turbofit.core.tuning import TrialRecord, Tuning
from turbofit.core.units import format_duration
from turbofit.core.version import __version__
from turbofit.measure.capacity import CapacitySearch, within_host
from turbofit.measure.tune_runner import TrialEnd, meets, order, run_loads, run_trial
from turbofit.measure.tune_space import choices, drafts_to_try, forecast_of, host_of
from turbofit.memory.calibrated import identity
from turbofit.planning.tuned import cards_of, keep_tuned, plain, promise_of, recall_tuned
from turbofit.rehearsal.plan_clock import NO_CLOCK, ClockChoice, clock_for
from turbofit.serving.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.plan import Plan
    from turbofit.core.struct import Options
    from turbofit.core.tuning import SpeedFigures
    from turbofit.measure.load.spec import LoadSpec
    from turbofit.measure.tune_space import TrialChoice
    from turbofit.planning.request import PlanRequest
    from turbofit.serving.leases import Leases
    from turbofit.serving.options import ServeConfig

#: Seconds that a trial measures by default.
_SECONDS: Final = 30.0
#: The most requests at once in a default load.
_MOST_AT_ONCE: Final = 128
#: The most clients at once for which an SLO is tried.
_MOST_CLIENTS: Final = 512
_SHOWN: Final = 120


class TuneRequest(NamedTuple):
    """A tuning that a person asks for: the request of the plan, and the load of the trials.

    All trials together may take ``seconds`` from ``began``, a time of the monotonic clock. With
    ``apart`` the result holds for pretend GPUs only.
    """

    request: PlanRequest
    load: LoadSpec
    slo: dict[str, float]
    kv_types: tuple[int, ...]
    drafts: tuple[int, ...]
    starts: int
    seconds: float
    began: float
    apart: bool

    def check(self) -> None:
        """Refuse numbers of draft tokens without a draft, beside a given number, or without a card.

        Raises:
            UsageError: the options contradict each other, or nothing could be measured.
        """
        given = self.request.given()
        if self.drafts and "speculative_algorithm" not in given:
            raise UsageError(
                "--drafts tries a draft, and none is given", hint="give --speculative-algorithm"
            )
        if self.drafts and "speculative_num_draft_tokens" in given:
            raise UsageError(
                "--drafts and --speculative-num-draft-tokens are one setting",
                hint="give only one of the two",
            )
        if self.drafts and self.apart:
            raise UsageError(
                "--drafts asks which number of tokens is the fastest, and pretend GPUs accept no"
                " token of a draft: nothing would be measured",
                hint="run it on the card; `turbofit plan` says how many requests run at once with"
                " each number",
            )


def tune_model(
    wanted: TuneRequest, config: ServeConfig, leases: Leases, say: Callable[[str], None]
) -> Tuning:
    """Try settings, and keep the best for later plans.

    ``config`` is for all trials; its request is planned here.

    Raises:
        StoppedError: a signal came before anything was measured.
        UsageError: the plan is for Transformers, which has no settings to tune; or an SLO is given
          for pretend GPUs without a clock.
    """
    run = Run(config, leases, say)
    run.plan = run.planner.make({})
    if not run.plan.backend.of_lmdeploy:
        raise UsageError(
            f"{run.plan.model.name} is planned for Transformers: tune tries LMDeploy's settings",
            hint="turbofit serve serves it",
        )
    usual = run.checked_plan()
    load = _load(wanted.load, usual)
    clock = clock_for(usual, config.clock or 0.0)
    timed = clock.factor > 0 or not wanted.apart
    if not timed:
        _refuse_slo(wanted, usual, clock)
    facts = _facts(wanted, usual, load, run.lmdeploy.version, clock)
    assert config.request is not None
    blank = Tuning(turbofit_version=__version__, created="", pretend=wanted.apart, **facts)
    slower = max(1.0, clock.factor)
    if config.pretend:
        say(clock.words)
    if slower > 1:
        say(f"each load takes {slower:g} times as long here as on the card, and so does --time")
    if clock.factor and wanted.slo and not {"concurrency", "rate"} & wanted.load.given().keys():
        return _capacity(run, wanted, usual, load, blank, say)
    on_here = config.request.changed(on=usual.machine, gpus=None)
    candidates, at_once = _choices(wanted, on_here, usual, load, say)

    def trial(plan: Plan, load: LoadSpec) -> TrialEnd:
        """Run a trial. A slow clock gives the host too much time for images: bound the rate."""
        end = run_trial(run, plan, load)
        if not timed and end.measured is not None:
            return without_figures(end.measured)
        if slower == 1 or end.measured is None:
            return end
        rate = _host_rate(plan, load)
        return end._replace(measured=within_host(end.measured, rate))

    tuner = Tuner(
        candidates, load, run.planner.make, trial, say,
        at_once=at_once, blank=blank, starts=wanted.starts,
        seconds=slower * wanted.seconds - (time.monotonic() - wanted.began),
    )  # fmt: skip
    result = tuner.tune()
    if result.winner is None:
        return result
    alike = (
        tuning
        for tuning in recall_tuned(pretend=wanted.apart)
        if all(getattr(tuning, name) == value for name, value in facts.items())
    )
    if why := why_not_kept(result, next(alike, None)):
        say(f"not kept for later plans: {why}")
        return result
    try:
        keep_tuned(result)
    except (OSError, UsageError) as exc:
        say(f"warning: the result is not kept: {exc}")
    return result


def _refuse_slo(wanted: TuneRequest, plan: Plan, clock: ClockChoice) -> None:
    """Refuse an SLO, which pretend GPUs without a clock neither keep nor miss.

    Raises:
        UsageError: the person gave an SLO.
    """
    if not wanted.slo:
        return
    cards = " + ".join(dict.fromkeys(cards_of(plan.machine)))
    why = f": nobody knows how fast {plan.model.name} is on {cards}"
    if clock == NO_CLOCK:
        why = " with `--clock 0`, where forwards take no time"
    raise UsageError(
        f"`--slo` has no answer{why}", hint="leave `--slo` out, to see which settings start"
    )


def without_figures(measured: SpeedFigures) -> TrialEnd:
    """Return the end of a trial on pretend GPUs without a clock: its seconds are this host's."""
    if not meets(measured, {}):
        return TrialEnd(None, "unserved", f"{counted(measured.failed, 'request')} had no answer")
    return TrialEnd(None, "started", "it starts and answers; its speed is not known")


def _facts(
    wanted: TuneRequest, usual: Plan, load: LoadSpec, lmdeploy: str, clock: ClockChoice
) -> dict[str, Any]:
    """Return the facts for which a tuning holds: a later plan must have the same facts."""
    return {
        "model": identity(usual.model),
        "gpus": cards_of(usual.machine),
        "driver": str(usual.machine.driver),
        "promise": promise_of(wanted.request.given()),
        "load": plain(load.given()),
        "goal": wanted.request.goal,
        "slo": wanted.slo,
        "lmdeploy": lmdeploy,
        "forecast": clock.words if clock.factor else "",
    }


def _capacity(
    run: Run, wanted: TuneRequest, usual: Plan, load: LoadSpec, blank: Tuning,
    say: Callable[[str], None],
) -> Tuning:  # fmt: skip
    """Find for how many clients the plan's own settings keep the SLO, in one start of its engines.

    The result is not kept for later plans.
    """
    began = time.monotonic()
    load = load.changed(concurrency=None)
    most = max(1, min(_MOST_CLIENTS, 4 * usual.requests_at_once))
    limit = wanted.slo.get("ttft", math.inf)
    keeps = (n for n in range(most, 0, -1) if forecast_of(usual, load, n).ttft <= limit)
    # The formula does not know how long images wait for this host: the true number may be far
    # lower. The search begins with a quarter, since a load of few clients takes little time.
    first = max(1, min(next(keeps, 1), usual.requests_at_once) // 4)
    search = CapacitySearch(
        load, wanted.slo, first=first, most=most, host_rate=_host_rate(usual, load), say=say
    )
    say(f"at most six loads, each of {_length(load)}, and their last answers")
    run_loads(run, usual, search.loads())
    return replace(
        blank,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 1),
        capacity=search.found(),
    )


def _host_rate(plan: Plan, load: LoadSpec) -> float:
    """Return the requests a second for which the host prepares images; infinity without images."""
    host = host_of(plan, load)
    return math.inf if host is None else host.images_per_second / load.images


def why_not_kept(result: Tuning, before: Tuning | None) -> str:
    """Return why later plans keep the result ``before``; empty if they use the new result."""
    if before is not None and result.interrupted and len(result.trials) < len(before.trials):
        tried = counted(len(before.trials), "setting")
        return f"it was interrupted, and an earlier tuning tried {tried}"
    return ""


def _choices(
    wanted: TuneRequest, request: PlanRequest, usual: Plan, load: LoadSpec,
    say: Callable[[str], None],
) -> tuple[list[TrialChoice], int]:  # fmt: skip
    """Return the choices and the number of requests at once; say both to the person."""
    at_once = load.at_once or _at_once(usual)
    if wanted.drafts:
        candidates = drafts_to_try(request, usual, load, at_once, wanted.drafts)
    else:
        candidates = choices(
            request,
            usual,
            load,
            at_once,
            wanted.kv_types,
            prefix=load.shared_prefix > 0 or load.turns > 1,
        )
    say(
        f"{counted(len(candidates), 'choice')} of settings under the promise of the plan: those"
        f" with the best forecast are tried, at most {wanted.starts} and"
        f" {format_duration(wanted.seconds)}, each for {described(load)}; then the best for twice"
        " as long"
    )
    return candidates, at_once


def _load(load: LoadSpec, usual: Plan) -> LoadSpec:
    """Return the load with its defaults: 30 seconds, and the requests at once of `_at_once`.

    The load has no images if the plan has none.
    """
    images = {} if usual.promise.limits.vision_unit is not None else {"images": 0}
    window = {} if load.requests or load.seconds else {"seconds": _SECONDS}
    loop = {}
    if load.rate is None and load.concurrency is None:
        loop = {"concurrency": _at_once(usual)}
    return load.changed(**{**images, **load.given(), **window, **loop})


def described(load: LoadSpec) -> str:
    """Return a short description of a load, with its length in requests or in time."""
    how = f"{load.at_once} at once" if load.rate is None else f"{load.rate:g} a second"
    return f"{_length(load)}, {how}, after {counted(load.warm_up_requests, 'request')} of warm-up"


def _length(load: LoadSpec) -> str:
    seconds = load.measured_seconds
    return counted(load.requests or 0, "request") if seconds is None else format_duration(seconds)


def _at_once(usual: Plan) -> int:
    """Return the number of requests at once for the trials: twice the plan's, at most 128.

    Twice the plan's requests keep a batch full.
    """
    return max(1, min(_MOST_AT_ONCE, 2 * usual.requests_at_once))


@dataclass
class Tuner:
    """Tries the first choice, then choices with the best forecasts, then the best choice again.

    ``plan_of`` makes the plan of options anew, for the present machine. ``run`` starts a plan's
    engines and drives the load. ``at_once``: requests under way. ``starts``: how many choices are
    tried. ``seconds``: the time of all trials. ``blank``: the result without its trials.
    """

    choices: Sequence[TrialChoice]
    load: LoadSpec
    plan_of: Callable[[Options], Plan]
    run: Callable[[Plan, LoadSpec], TrialEnd]
    say: Callable[[str], None]
    _: KW_ONLY
    at_once: int
    blank: Tuning
    starts: int
    seconds: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._trials: list[TrialRecord] = []
        self._ends = self.clock() + self.seconds

    @property
    def left(self) -> float:
        """The seconds that are left for trials."""
        return self._ends - self.clock()

    def tune(self) -> Tuning:
        """Run the trials; return all of them and the best.

        Raises:
            StoppedError: a signal came before a trial ended.
        """
        left, best, stopped = list(self.choices), None, ""
        try:
            while left and len(self._trials) < self.starts and self._has_time():
                choice = left[0] if not self._trials else self._most_promising(left)
                left.remove(choice)
                self._trials.append(self._try(choice, self.load))
            best = self._best_again()
        except StoppedError as exc:
            if not self._trials:
                raise
            stopped = exc.signal.name
        best = best or next(iter(self._good()), None)
        return replace(
            self.blank,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            best=None if best is None else best.number,
            trials=tuple(self._trials),
            stopped=stopped or self._left_out(left),
            seconds=round(sum(trial.seconds for trial in self._trials), 1),
        )

    def _best_again(self) -> TrialRecord | None:
        """Try the best choice again, for twice as long; return the new trial if it is good.

        If the new trial is not good, the next best choice is tried again. None if only one trial is
        good, no time is left, or all choices fail.
        """
        good = self._good()
        for trial in good if len(good) > 1 else ():
            if not self._has_time():
                break
            choice = next(choice for choice in self.choices if choice.options == trial.options)
            self._trials.append(again := self._try(choice, _twice(self.load), again=True))
            if again.meets_slo:
                return again
        return None

    def _good(self) -> list[TrialRecord]:
        """Return the trials that meet the SLO, the best first.

        Trials whose options failed in a second trial are left out.
        """
        failed = [trial.options for trial in self._trials if trial.again and not trial.meets_slo]
        good = [trial for trial in self._trials if trial.meets_slo and trial.options not in failed]
        return sorted(good, key=self._value, reverse=True)

    def _most_promising(self, left: Sequence[TrialChoice]) -> TrialChoice:
        """Return the choice to try next, by all forecasts and the first measured trial."""
        measured = next(
            ((choice.forecast, trial.measured)
             for trial in self._trials
             for choice in self.choices
             if trial.measured is not None and choice.options == trial.options),
            None,
        )  # fmt: skip
        return order(left, measured, self.blank.slo, self.at_once)[0]

    def _value(self, trial: TrialRecord) -> float:
        """Return the value of a measured trial by the goal; a larger value is better."""
        assert trial.measured is not None
        if self.blank.goal == "latency":
            return -trial.measured.e2e_p50
        return trial.measured.requests_per_second

    def _has_time(self) -> bool:
        """Return whether the time that is left suffices for a trial as long as the longest."""
        return self.left >= max((trial.seconds for trial in self._trials), default=-math.inf)

    def _left_out(self, left: Sequence[TrialChoice]) -> str:
        """Return a message on the choices that were not tried, and why."""
        if not left:
            return "all settings were tried"
        why = "those with the best forecast were tried"
        if len(self.choices) - len(left) < self.starts:
            why = "the time is up"
        most = max(left, key=lambda choice: choice.rate).forecast.told.words
        return (
            f"{len(left)} of {len(self.choices)} settings were not tried, whose forecast is"
            f" {most} requests/s at most: {why}"
        )

    def _try(self, choice: TrialChoice, load: LoadSpec, *, again: bool = False) -> TrialRecord:
        """Run one trial, and say how it begins and ends; return its record."""
        number, begun = len(self._trials) + 1, self.clock()
        plan, settings = choice.plan, [engine.settings for engine in choice.plan.engines]
        what = f"trial {number}, the best again" if again else f"trial {number} of {self.starts}"
        trial = TrialRecord(
            number=number,
            options=choice.options,
            engine=plan.backend.name,
            tp=plan.tp,
            replicas=plan.replicas,
            max_batch_size=min(each.max_batch_size for each in settings),
            max_prefill_token_num=min(each.max_prefill_token_num for each in settings),
            quant_policy=settings[0].quant_policy,
            enable_prefix_caching=settings[0].enable_prefix_caching,
            kv_tokens=plan.kv_tokens,
            forecast=choice.forecast.told,
            outcome="unserved",
            again=again,
        )
        self.say(f"trial {number}: {trial.settings}")
        end = self._end_of(choice.options, load, what)
        keeps = end.measured is not None and meets(end.measured, self.blank.slo)
        if end.measured is None:
            self.say(f"trial {number}: {end.outcome}: {end.why[:_SHOWN]}")
        else:
            self.say(
                f"trial {number}: {end.measured.requests_per_second:.2f} requests/s, forecast "
                f"{choice.forecast.told.words}{'' if keeps else ', which misses the SLO'}"
            )
        return replace(
            trial,
            outcome=end.outcome,
            why=end.why,
            measured=end.measured,
            meets_slo=keeps,
            seconds=round(self.clock() - begun, 1),
        )

    def _end_of(self, options: Options, load: LoadSpec, what: str) -> TrialEnd:
        """Run the options' plan if it fits now; return how the trial ended."""
        try:
            plan = self.plan_of(options)
            if not plan.fits:
                return TrialEnd(None, "unserved", plan.verdict)
            with under_way(f"{what}, {format_duration(max(self.left, 0.0))} of --time left"):
                return self.run(plan, load)
        except TurbofitError as exc:
            return TrialEnd(None, "unserved", exc.message)


def _twice(load: LoadSpec) -> LoadSpec:
    """Return the load with twice the seconds and requests that it states."""
    lengths = {name: getattr(load, name) for name in ("seconds", "requests")}
    return load.changed(**{name: 2 * value for name, value in lengths.items() if value})
