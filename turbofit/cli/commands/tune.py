"""``turbofit calibrate``, ``tune``, ``bench``: memory and speed, measured for later plans."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.terminal.output import (
    INTERRUPTED,
    Form,
    complain,
    exit_code,
    note,
    run_until_signal,
    say,
)
from turbofit.core.errors import DoesNotFitError, UnservedError, UsageError
from turbofit.core.messages import counted
from turbofit.core.process.progress import tell
from turbofit.core.units import parse_seconds
from turbofit.measure.load.spec import LoadSpec
from turbofit.planning.request import PlanRequest
from turbofit.serving.options import (
    CalibrateOptions,
    TuneOptions,
    refuse_elsewhere,
)

if TYPE_CHECKING:
    from turbofit.core.process.signals import StopSignal
    from turbofit.core.struct import Document
    from turbofit.core.tuning import Tuning

_PRETEND: Final = (
    "PRETEND GPUs: the calibration is only tried; its results are kept for pretend GPUs alone"
)
_PRETEND_SPEED: Final = (
    "PRETEND GPUs: no speed is measured on a card, and the results are kept for pretend GPUs alone"
)
#: Options of the load; a plan has options of the same names with another meaning.
_BOTH: Final = ("images", "image_size", "concurrency", "prompt_tokens", "output_tokens")
#: Those of them that a plan takes from the load.
_SAME: Final = ("images", "prompt_tokens", "output_tokens")
#: Options of a plan that make no sense here: one ignores tunings, one puts memory before speed.
_OTHER_GOALS: Final = ("no_tuned", "least")
_LOAD_GROUPS: Final = {
    "requests": (
        "images", "image_size", "prompt_tokens", "shared_prefix", "output_tokens", "whole",
        "stop_early", "turns",
    ),
    "arrivals": ("concurrency", "rate", "pause"),
    "window": ("requests", "seconds", "warm_up", "timeout"),
}  # fmt: skip
LOAD_OPTIONS: Final = tuple(fields.grouped_options(LoadSpec, _LOAD_GROUPS))
_PLANNING: Final = tuple(
    option for option in common.planning_options() if option.name not in (*_BOTH, *_OTHER_GOALS)
)


@command(
    *common.model_argument(),
    *common.machine_options(),
    *common.FORMS,
    *fields.options_of(CalibrateOptions, group="calibration"),
    *common.planning_options(),
    only_linux=True,
)
def calibrate(*, model: str, form: Form, **given: Any) -> int:
    """Calibrate and show what was learned; exit 130 if Ctrl-C ended it."""
    from turbofit.measure.calibrate import calibrate as measure
    from turbofit.planning.calibrations import pretends
    from turbofit.serving.engine.engine_client import Timing
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.planner import forget_learned, launch_request

    options = fields.filled(CalibrateOptions, given)
    request = fields.filled(PlanRequest, {**given, "model": model})
    if not options.pretend:
        refuse_elsewhere(request, "calibrate measures")
    apart = options.pretend or pretends()
    if options.forget:
        say(f"forgot {counted(forget_learned(model, pretend=options.pretend), 'document')}")
        return 0

    def body(stop: StopSignal) -> Document | signal.Signals:
        if options.pretend:
            note(_PRETEND)
            # A pretend card takes what its plan says. With an earlier calibration in that plan, the
            # same difference would be learned a second time.
            forget_learned(model, pretend=True)
        config = ServeConfig.of(
            request=launch_request(request, pretend=options.pretend),
            timing=Timing(start=60 * options.minutes, drain=0.0, liveness=0.0),
            command="calibrate",
            **options.run_fields(),
        )
        return measure(config, stop, say, apart=apart)

    result = run_until_signal(body)
    if isinstance(result, signal.Signals):
        return exit_code(result)
    from turbofit.report.views.measured_view import calibration_view

    form.show(result, calibration_view)
    return 0


@command(
    *common.model_argument(),
    *common.machine_options(),
    *common.FORMS,
    common.HTML,
    *fields.options_of(
        TuneOptions,
        [name for name in TuneOptions.model_fields if name != "no_rehearse"],
        group="tuning",
    ),
    *LOAD_OPTIONS,
    *_PLANNING,
    only_linux=True,
)
def tune(*, model: str, form: Form, **given: Any) -> int:
    """Tune and show the trials; exit 3 if none meets the SLO, 130 if a signal ended it."""
    from turbofit.measure.load.spec import LoadSpec
    from turbofit.measure.tune import TuneRequest, tune_model
    from turbofit.measure.tune_runner import parse_slo
    from turbofit.planning.calibrations import pretends
    from turbofit.report.views.measured_view import tune_view
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.planner import forget_learned, launch_request, leases_for

    began = time.monotonic()
    options, load = fields.filled(TuneOptions, given), fields.filled(LoadSpec, given)
    load.check()
    request = _request(model, given, load)
    options.refuse_real_clock()
    if not options.pretend:
        refuse_elsewhere(request, "tune measures")
    if request.goal == "context":
        raise UsageError(
            "a load does not measure context", hint="--goal throughput, or --goal latency"
        )
    apart = options.pretend or pretends()
    if options.forget:
        say(f"forgot {counted(forget_learned(model, pretend=options.pretend), 'document')}")
        return 0
    slo = {} if options.slo is None else parse_slo(options.slo)
    if load.whole and slo.keys() - {"e2e"}:
        raise UsageError(
            "answers in one piece have no time of a first token, nor of a token",
            hint="leave `--whole` out, or limit e2e",
        )
    wanted = TuneRequest(
        request, load,
        slo=slo,
        kv_types=options.kv_policies,
        drafts=options.draft_tokens,
        starts=options.starts,
        seconds=parse_seconds(options.time, "--time"),
        began=began, apart=apart,
    )  # fmt: skip

    wanted.check()

    def body(_: StopSignal) -> Tuning:
        if options.pretend:
            note(_PRETEND_SPEED)
        here = launch_request(request, pretend=options.pretend)
        config = ServeConfig.of(
            request=here, **options.run_fields(), no_rehearse=True, command="tune"
        )
        with leases_for(config) as leases:
            return tune_model(wanted, config, leases, say)

    tuning = run_until_signal(body)
    if isinstance(tuning, signal.Signals):
        return INTERRUPTED
    form.show(tuning, tune_view)
    if tuning.interrupted:
        return INTERRUPTED
    found = (
        tuning.best or tuning.started or (tuning.capacity is not None and tuning.capacity.clients)
    )
    return 0 if found else DoesNotFitError.exit_code


def _request(model: str, given: dict[str, Any], load: LoadSpec) -> PlanRequest:
    """Make the request for a plan, for as many images and tokens as requests of the load have."""
    planned = {name: value for name, value in given.items() if name not in _BOTH}
    request = fields.filled(PlanRequest, {**planned, "model": model, "no_tuned": True})
    same = {name: getattr(load, name) for name in _SAME if name in load.model_fields_set}
    if not load.output_tokens:  # the requests state none
        same.pop("output_tokens")
    return request.changed(**same) if same else request


@command(
    *common.SERVER_OPTIONS[:1],
    *common.FORMS,
    common.HTML,
    *common.SERVER_OPTIONS[1:],
    *LOAD_OPTIONS,
    only_linux=True,
)
def bench(
    *, url: str | None, model: str | None, api_key: str | None, form: Form, **given: Any
) -> int:
    """Send a load to a server and show its speed.

    Exit 3 if nothing was answered, 130 if a signal ended the load.
    """
    from turbofit.measure.load.driver import bench as measure
    from turbofit.report.views.measured_view import load_view

    spec = fields.filled(LoadSpec, given)
    address, key = common.server_of(url, api_key)
    result = measure(
        address, spec, key=key, model=model, tick=lambda run: tell(run.step()), say=say
    )
    form.show(result, load_view)
    if not result.answered and result.begun:
        worst = result.errors[0]
        error = UnservedError(
            f"no request was answered: {counted(worst.count, 'time')} {worst.kind}",
            hint=worst.example or "see what the server logs",
        )
        complain(error.to_dict(), as_json=False)  # on stderr: stdout has the result already
        return error.exit_code
    return INTERRUPTED if result.stopped.startswith("SIG") else 0
