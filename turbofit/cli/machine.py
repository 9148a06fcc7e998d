"""``turbofit machine``: what the hardware is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Which machine, and where to keep it."""
    options.add_machine(parser)
    parser.add_argument("--save", metavar="FILE", help="write a snapshot for --on FILE")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, keep, show."""
    from turbofit.cli.output import answer, note, show
    from turbofit.core.struct import to_json
    from turbofit.machine.source import machine_from

    machine = machine_from(args.on, gpus=args.gpus)
    if args.save:
        _save(args.save, to_json(machine))
        note(f"saved to {args.save}")
    if args.json:
        answer(to_json(machine))
    else:
        from turbofit.report.machine_view import machine_view

        show(machine_view(machine), markdown=args.md)
    return 0


def _save(path: str, text: str) -> None:
    from turbofit.core.errors import UsageError

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be written: {exc.strerror or exc}", hint="choose another file"
        ) from None
