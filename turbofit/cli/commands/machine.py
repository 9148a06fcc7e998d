"""``turbofit machine``: what the hardware is, and with ``--measure`` how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import FORMS, FULL, machine_options
from turbofit.cli.terminal.output import Form, note, say

if TYPE_CHECKING:
    from turbofit.core.machine import Machine


@command(
    *machine_options(),
    Option("--save", metavar="FILE", type=PATH),
    Option("--measure", is_flag=True),
    FULL,
    *FORMS,
)
def machine(
    *,
    on: str | None,
    gpus: str | None,
    save: str | None,
    measure: bool,
    form: Form,
) -> int:
    from turbofit.machine.source import machine_from, save_snapshot
    from turbofit.report.views.machine_view import machine_view

    hardware = machine_from(on, gpus=gpus)
    if measure:
        hardware = _measured(hardware, on)
    if save:
        save_snapshot(hardware, save)
        say(f"saved to {save}")
    form.show(hardware, machine_view)
    return 0


def _measured(machine: Machine, on: str | None) -> Machine:
    """Measure, and keep it.

    Raises:
        UsageError: a machine that is not this one.
    """
    from turbofit.core.errors import UsageError
    from turbofit.machine.speed import keep, measure_speed, with_measured

    if on is not None:
        raise UsageError("--measure measures this machine", hint="leave --on out")
    speed = measure_speed(machine, say=say)
    try:
        say(f"kept in {keep(machine, speed)}")
    except (OSError, UsageError) as exc:
        note(f"not kept: {exc}")
    return with_measured(machine, speed)
