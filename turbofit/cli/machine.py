"""``turbofit machine``: what the hardware is, and with ``--measure`` how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.core.machine import Machine

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Which machine, and where to keep it."""
    options.add_machine(parser)
    parser.add_argument("--save", metavar="FILE", help="write a snapshot for --on FILE")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure cards and links with torch, in a minute, and keep it for later plans",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, keep, show."""
    from turbofit.cli.output import answer, note, show
    from turbofit.core.struct import to_json
    from turbofit.machine.source import machine_from

    machine = machine_from(args.on, gpus=args.gpus)
    if args.measure:
        machine = _measured(machine, args.on)
    if args.save:
        _save(args.save, to_json(machine))
        note(f"saved to {args.save}")
    if args.json:
        answer(to_json(machine))
    else:
        from turbofit.report.machine_view import machine_view

        show(machine_view(machine), markdown=args.md)
    return 0


def _measured(machine: Machine, on: str | None) -> Machine:
    """Measure, and keep it.

    Raises:
        UsageError: a machine that is not this one.
    """
    from turbofit.cli.output import note
    from turbofit.core.errors import UsageError
    from turbofit.machine.measured import keep, measure_speed, with_measured

    if on is not None:
        raise UsageError("--measure measures this machine", hint="leave --on out")
    found = measure_speed(machine, say=note)
    try:
        note(f"kept in {keep(machine, found)}")
    except OSError as exc:
        note(f"not kept: {exc.strerror or exc}")
    return with_measured(machine, found)


def _save(path: str, text: str) -> None:
    from turbofit.core.errors import UsageError

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}", hint="choose another file"
        ) from None
