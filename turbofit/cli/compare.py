"""``turbofit compare A B``: two plans side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """The two, and the form."""
    what = "a plan, prediction or rehearsal that was saved, a run's folder, or latest"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", help="another one")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read both and show what differs."""
    from turbofit.cli.output import answer, show
    from turbofit.report.compare import compare, compare_blocks
    from turbofit.report.saved import read_saved

    found = compare(read_saved(args.a), read_saved(args.b))
    if args.json:
        from turbofit.core.struct import to_json

        answer(to_json(found))
    else:
        show(compare_blocks(found), markdown=args.md)
    return 0
