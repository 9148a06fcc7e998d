"""``turbofit tune MODEL``: settings tried on the real engine under a load, and the best kept."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from pydantic import Field

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.commands.bench import LOAD_OPTIONS
from turbofit.cli.options.common_options import (
    FORMS,
    machine_options,
    model_argument,
    planning_options,
)
from turbofit.cli.options.fields import filled, options_of
from turbofit.cli.options.launch_options import LaunchOptions
from turbofit.cli.serving.serve_plan import given_request, launch_request, planner_of, refuse
from turbofit.cli.terminal.interrupt import exit_code, run_until_signal
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.validation import Metavar

if TYPE_CHECKING:
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.core.tuning import Tuning
    from turbofit.launch.engine.environment import Lmdeploy
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.launch.tune.runner import TrialRunner
    from turbofit.launch.tune.tuning import TuneTask
    from turbofit.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest

__all__ = ["show_tuning", "tune"]

_PRETEND: Final = (
    "PRETEND GPUs: this tries the tuning itself; speed is not real, and what is found is kept for "
    "pretend GPUs only"
)
#: Seconds that a trial measures, where nobody says.
_SECONDS: Final = 30.0
#: The most requests at once of a load that nobody described.
_MOST_AT_ONCE: Final = 128
#: Options that a plan has, too, and means otherwise: here they are the load's.
_BOTH: Final = ("images", "image_size", "concurrency")
#: Options of a plan that want no tuning: what it found ignored, and memory before speed.
_OTHER_GOALS: Final = ("no_tuned", "least")


class TuneOptions(LaunchOptions):
    """What `tune` asks beside a plan and a load."""

    time: Annotated[str, Metavar("TIME")] = Field(
        default="20m", description="all of it together: 90s, 20m, 2h; a trial under way is ended"
    )
    starts: Annotated[int, Field(ge=1, le=1000), Metavar("N")] = Field(
        default=12, description="starts of an engine at most"
    )
    slo: Annotated[str | None, Metavar("LIMITS")] = Field(
        default=None, description="what 90% of the requests must keep: ttft=2s,tpot=50ms,e2e=20s"
    )
    kv_types: Annotated[str, Metavar("LIST")] = Field(
        default="0,8",
        description="values of --quant-policy to try; 8 and 4 store keys and values in fewer bits, "
        "which changes answers a little",
    )
    pretend: bool = Field(default=False, description="on pretend GPUs: no speed is real")
    forget: bool = Field(default=False, description="drop what was tuned of this model, and end")
    again: bool = Field(default=False, description="try again what was tuned before")


_PLANNING: Final = tuple(
    one for one in planning_options() if one.name not in (*_BOTH, *_OTHER_GOALS)
)


@command(
    *model_argument(),
    *machine_options(),
    *FORMS,
    Option("--html", metavar="FILE", type=PATH, form=True, help="one page; - for stdout"),
    *options_of(
        TuneOptions,
        [name for name in TuneOptions.model_fields if name != "no_rehearse"],
        group="tuning",
    ),
    *LOAD_OPTIONS,
    *_PLANNING,
    only_linux=True,
)
def tune(*, model: str, html: str | None, as_json: bool, md: bool, **given: Any) -> int:
    """Tune and show; 3 where nothing meets the SLO, 130 where Ctrl-C ended it."""
    from turbofit.cli.terminal.output import say
    from turbofit.launch.serve.leases import Leases
    from turbofit.load.spec import LoadSpec

    began = time.monotonic()
    given = _timed(given)
    options, load = filled(TuneOptions, given), filled(LoadSpec, given)
    options.check()
    load.check()
    request = _request(model, given, load)
    if request.on is not None and not options.pretend:
        raise UsageError(
            "tune measures the machine here, so --on does not go with it",
            hint="leave --on out, or add --pretend",
        )
    if request.goal == "context":
        raise UsageError(
            "a load does not measure context", hint="--goal throughput, or --goal latency"
        )
    arguments = _TuneArguments(model, request, options, load, began)
    if options.forget:
        return _forget(arguments)

    def body(_: StopSignal) -> signal.Signals | Tuning:
        with Leases() as leases:
            return _tune(arguments, leases)

    ended = run_until_signal(body)
    if isinstance(ended, signal.Signals):
        say("stopped: the trials so far are kept, and the same command goes on from there")
        return exit_code(ended)
    show_tuning(ended, html, as_json=as_json, md=md)
    return 0 if ended.best is not None else DoesNotFitError.exit_code


class _TuneArguments(NamedTuple):
    """The command line of `tune`, read once."""

    model: str
    request: PlanRequest
    options: TuneOptions
    load: LoadSpec
    began: float

    @property
    def kept_apart(self) -> bool:
        """Whether what is found holds for pretend GPUs only."""
        from turbofit.observe.calibrations import pretends

        return self.options.pretend or pretends()


def _timed(given: Options) -> Options:
    """The options where a --budget that is a time, as it was before --time, is one.

    Raises:
        UsageError: both are given.
    """
    from turbofit.cli.terminal.output import say
    from turbofit.core.units import MIB
    from turbofit.launch.tune.slo import parse_seconds

    budget: str = given.get("budget") or ""
    try:
        seconds = parse_seconds(budget, "--budget")
    except UsageError:
        return given
    if budget.strip().isdigit() and seconds >= MIB:
        return given  # bytes
    if given.get("time") is not None:
        raise UsageError(
            f"--budget {budget} and --time are two times",
            hint="give one of them; --budget is bytes, as 19GiB",
        )
    say(f"--budget {budget} is taken as --time {budget}: --budget is bytes, as of plan and serve")
    return {**given, "budget": None, "time": budget}


def _request(model: str, given: dict[str, Any], load: LoadSpec) -> PlanRequest:
    """What is planned: the promise has room for the load's images."""
    planned = {name: value for name, value in given.items() if name not in _BOTH}
    request = given_request(model, planned).changed(no_tuned=True)
    if "images" in load.model_fields_set:
        request = request.changed(images=load.images)
    return request


def _forget(arguments: _TuneArguments) -> int:
    from turbofit.cli.terminal.output import say
    from turbofit.memory.calibrated import identity
    from turbofit.model.source import resolve_model
    from turbofit.observe.tuned import forget_tuned

    name = identity(resolve_model(arguments.model, revision=arguments.request.revision))
    say(f"forgot {forget_tuned(name, pretend=arguments.kept_apart)} tunings")
    return 0


def _tune(arguments: _TuneArguments, leases: Leases) -> signal.Signals | Tuning:
    """Try and keep; the signal where one ended it."""
    from turbofit.cli.terminal.output import note, say
    from turbofit.launch.engine.environment import lmdeploy_if_needed
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.tune.journal import Journal
    from turbofit.launch.tune.tuning import Tools
    from turbofit.launch.tune.tuning import tune as try_all
    from turbofit.observe.tuned import keep_tuned, tuned_key

    options = arguments.options
    lmdeploy, missing = lmdeploy_if_needed(arguments.request.engine)
    if options.pretend:
        note(_PRETEND)
    request = launch_request(arguments.request, pretend=options.pretend)
    config = ServeConfig.of(request=request, **{**options.config_fields(), "rehearse": False})
    planner = planner_of(config, leases, doubled=lmdeploy.warning is not None)
    usual = planner.make({})
    refuse(usual, missing, pretend=options.pretend)
    if not usual.engine.of_lmdeploy:
        raise UsageError(
            f"{usual.model.name} is planned for Transformers: tune tries LMDeploy's settings",
            hint="turbofit serve serves it",
        )
    task = _task(arguments, request, usual, lmdeploy)
    known = _known(task)
    if known is not None and not options.again:
        say("tuned before: --again tries again, --forget drops it")
        return known
    key = tuned_key(*task.facts.values(), task.load.given(), task.goal, task.slo)
    journal = Journal(key, pretend=arguments.kept_apart)
    if journal.trials:
        say(f"going on after {len(journal.trials)} trials of an earlier run")
    runner = _runner(config, lmdeploy, leases)
    result = try_all(task, journal, Tools(planner.make, runner.run, say))
    if isinstance(result, signal.Signals):
        return result
    winner = result.winner
    if winner is not None and winner.outcome == "cut":
        say("not kept for later plans: only a part of the load was measured")
        return result
    try:
        if winner is not None:
            keep_tuned(result)
    except (OSError, UsageError) as exc:
        say(f"warning: the result is not kept: {exc}")
        return result
    journal.forget()
    return result


def _runner(config: Any, lmdeploy: Lmdeploy, leases: Leases) -> TrialRunner:
    from turbofit.cli.terminal.output import say
    from turbofit.launch.serve.download import WeightsFetcher
    from turbofit.launch.tune.runner import TrialRunner

    fetch = None if config.pretend else WeightsFetcher(say)
    return TrialRunner(config, lmdeploy, leases, say, fetch=fetch)


def _task(
    arguments: _TuneArguments, request: PlanRequest, usual: Plan, lmdeploy: Lmdeploy
) -> TuneTask:
    """What there is to try, and under which load."""
    from turbofit.cli.terminal.output import say
    from turbofit.core.units import format_duration
    from turbofit.launch.tune.forecast import mean_request
    from turbofit.launch.tune.image_limit import smaller_limit
    from turbofit.launch.tune.slo import parse_seconds, parse_slo
    from turbofit.launch.tune.space import choices
    from turbofit.launch.tune.tuning import TuneTask
    from turbofit.memory.calibrated import identity
    from turbofit.observe.tuned import cards_of, promise_of

    options = arguments.options
    load = _load(arguments.load, usual)
    at_once = load.at_once or _at_once(usual)
    prefix = load.shared_prefix > 0 or load.trace is not None
    on_here = request.changed(on=usual.machine, gpus=None)
    mean = mean_request(load)
    found = choices(on_here, usual, mean, at_once, _kv_types(options.kv_types), prefix=prefix)
    smaller = smaller_limit(on_here, usual, load, mean, at_once)
    if smaller is not None:
        say(str(smaller))
    limit = parse_seconds(options.time, "--time")
    say(
        f"{len(found)} settings keep the promise of the plan: at most {options.starts} starts and "
        f"{format_duration(limit)}, each start for {_described(load)}"
    )
    facts = {
        "model": identity(usual.model),
        "gpus": cards_of(usual.machine),
        "driver": str(usual.machine.driver),
        "lmdeploy": lmdeploy.version,
        "pretend": arguments.kept_apart,
        "promise": promise_of(arguments.request.given()),
    }
    goal, slo = arguments.request.goal, parse_slo(options.slo) if options.slo else {}
    left = limit - (time.monotonic() - arguments.began)
    task = TuneTask(found, load, at_once, goal, slo, left, options.starts, facts, None)
    return task._replace(earlier=_earlier(task))


def _load(load: LoadSpec, usual: Plan) -> LoadSpec:
    """The load with what nobody said: as many requests at once as a batch may have, 30 s."""
    images = {} if usual.limits.vision_unit is not None else {"images": 0}
    window = {} if load.requests or load.trace or load.seconds else {"seconds": _SECONDS}
    given = load.given()
    loop = {}
    if load.rate is None and load.trace is None and load.concurrency is None:
        loop = {"concurrency": _at_once(usual)}
    return load.changed(**{**images, **given, **window, **loop})


def _described(load: LoadSpec) -> str:
    """A load in a few words, with its length."""
    from turbofit.core.units import format_duration

    if load.trace is not None:
        return f"the trace {load.trace}"
    seconds, requests = load.measured_seconds, load.requests
    length = f"{requests} requests" if seconds is None else format_duration(seconds)
    how = f"{load.at_once} at once" if load.rate is None else f"{load.rate:g} a second"
    return f"{length}, {how}, after {load.warm_up_requests} requests of warm-up"


def _at_once(usual: Plan) -> int:
    """Requests that show what a batch gives: twice what the plan runs, 128 at most."""
    running = usual.settings.max_batch_size * usual.parallel.replicas
    return max(1, min(_MOST_AT_ONCE, 2 * running))


def _kv_types(text: str) -> tuple[int, ...]:
    allowed = {"0": 0, "4": 4, "8": 8, "16": 16, "17": 17}
    found = [part.strip() for part in text.split(",")]
    if not all(one in allowed for one in found):
        raise UsageError(
            f"--kv-types {text!r} is no list of KV types", hint="write it as 0,8 or 0,8,4"
        )
    return tuple(allowed[one] for one in dict.fromkeys(found))


def _kept(task: TuneTask) -> list[Tuning]:
    """What is kept of this model, promise and load on these cards, of any LMDeploy."""
    from turbofit.observe.tuned import plain, recall_tuned

    facts = {name: value for name, value in task.facts.items() if name != "lmdeploy"}
    load = plain(task.load.given())
    return [
        one
        for one in recall_tuned(pretend=task.facts["pretend"])
        if all(getattr(one, name) == value for name, value in facts.items())
        and plain(one.load) == load
        and one.goal == task.goal
        and one.slo == task.slo
    ]


def _known(task: TuneTask) -> Tuning | None:
    return next((one for one in _kept(task) if one.lmdeploy == task.facts["lmdeploy"]), None)


def _earlier(task: TuneTask) -> Tuning | None:
    return next((one for one in _kept(task) if one.lmdeploy != task.facts["lmdeploy"]), None)


def show_tuning(result: Tuning, html: str | None, *, as_json: bool, md: bool) -> None:
    """In the form that was asked for."""
    from turbofit.cli.terminal.output import answer, show, write_page
    from turbofit.report.views.run.tune_view import tune_view

    if html:
        from turbofit.report.page.tune_page import tune_page

        write_page(tune_page(result), html)
    elif as_json:
        from turbofit.core.struct import to_json

        answer(to_json(result))
    else:
        show(tune_view(result), markdown=md)
