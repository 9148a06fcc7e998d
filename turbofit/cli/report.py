"""``turbofit report PLAN``: a saved plan again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.core.plan import Plan

__all__ = ["add_arguments", "read_plan", "run"]

#: Far above any plan: guards against reading a device or a checkpoint by mistake.
_LARGEST = 64 << 20


def add_arguments(parser: Parser) -> None:
    """The file."""
    parser.add_argument("plan", metavar="PLAN", help="what `plan --json` wrote, or - for stdin")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read and show; exit 3 where the plan does not fit."""
    from turbofit.cli.plan import show_plan

    return show_plan(read_plan(args.plan), args)


def read_plan(path: str) -> Plan:
    """A plan from a file, or from stdin for ``-``.

    Raises:
        UsageError: it cannot be read or is not a plan.
    """
    import sys

    from turbofit.core.errors import UsageError
    from turbofit.core.plan import PLAN_SCHEMA, Plan

    try:
        if path == "-":
            data = sys.stdin.buffer.read(_LARGEST)
        else:
            with open(path, "rb") as file:
                data = file.read(_LARGEST)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="write a plan with turbofit plan MODEL --json > plan.json",
        ) from None
    plan = Plan.from_json(data, what=f"plan {path}")
    if plan.schema != PLAN_SCHEMA:
        raise UsageError(
            f"plan {path} has schema {plan.schema!r}, not {PLAN_SCHEMA!r}",
            hint="plan again with this version of turbofit",
        )
    return plan
