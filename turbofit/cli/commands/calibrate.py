"""``turbofit calibrate MODEL``: launch, drive the worst case, read the GPUs, and learn of it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import command
from turbofit.cli.options.common_options import (
    FORMS,
    filled,
    machine_options,
    model_argument,
    options_of,
    planning_options,
)
from turbofit.cli.options.launch_options import CalibrateOptions
from turbofit.cli.serving import refuse_elsewhere
from turbofit.cli.terminal.output import exit_code, note, run_until_signal, say
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from turbofit.cli.terminal.output import Form
    from turbofit.core.json_types import Document
    from turbofit.launch.serve.supervisor import StopSignal

_PRETEND: Final = (
    "PRETEND GPUs: this tries the calibration itself; what it learns is kept for pretend GPUs only"
)


@command(
    *model_argument(),
    *machine_options(),
    *FORMS,
    *options_of(CalibrateOptions, group="calibration"),
    *planning_options(),
    only_linux=True,
)
def calibrate(*, model: str, form: Form, **given: Any) -> int:
    """Calibrate and show; 130 where Ctrl-C ended it, and it then goes on from there next time."""
    from turbofit.launch.calibrate.calibrate import calibrate as measure
    from turbofit.launch.calibrate.calibrate import drop, forget_all, progress_of
    from turbofit.launch.engine.engine_client import Timing
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.planner import launch_request
    from turbofit.observe.calibrations import pretends

    options = filled(CalibrateOptions, given)
    options.check()
    request = filled(PlanRequest, {**given, "model": model})
    if not options.pretend:
        refuse_elsewhere(request, "calibrate measures")
    apart = options.pretend or pretends()
    if options.forget:
        say(forget_all(request, apart=apart))
        return 0

    def body(stop: StopSignal) -> Document | signal.Signals:
        if options.pretend:
            note(_PRETEND)
            if options.again:  # a pretend card has what its plan says: it would learn that twice
                drop(request, apart=apart)
        config = ServeConfig.of(
            request=launch_request(request, pretend=options.pretend),
            timing=Timing(start=60 * options.minutes, drain=0.0, liveness=0.0),
            **options.config_fields(),
        )
        progress = progress_of(request, apart=apart)
        return measure(config, progress, stop, say, again=options.again, apart=apart)

    result = run_until_signal(body)
    if isinstance(result, signal.Signals):
        return exit_code(result)
    from turbofit.report.views.measured_view import calibration_view

    form.show(result, calibration_view)
    return 0
