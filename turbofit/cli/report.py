"""``turbofit report PLAN|RUN|latest``: what was planned, rehearsed or served, again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.report.saved import Saved

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """What to show, and in which form."""
    from turbofit.report.schema import NAMES

    parser.add_argument(
        "what",
        metavar="PLAN|RUN|latest",
        nargs="?",
        help="what `plan --json` wrote (- for stdin), the folder of a run of `serve`, or `latest`: "
        "the newest plan, prediction, rehearsal or run",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one JSON document on stdout")
    forms.add_argument("--md", action="store_true", help="Markdown on stdout, for issues")
    forms.add_argument(
        "--html", metavar="FILE", help="one page that needs no network; - for stdout"
    )
    forms.add_argument(
        "--schema",
        nargs="?",
        choices=NAMES,
        const=NAMES[0],
        help=f"the JSON Schema of a document instead (default {NAMES[0]})",
    )


def run(args: argparse.Namespace) -> int:
    """Read and show; exit 3 where the plan does not fit."""
    from turbofit.cli.output import answer, show

    if args.schema:
        from turbofit.report.schema import schema_text

        answer(schema_text(args.schema))
        return 0
    if args.what is None:
        raise UsageError("report needs a plan, a run or latest", hint="turbofit report latest")
    from turbofit.report.saved import read_saved

    saved = read_saved(args.what)
    if args.html:
        _page(saved, args.html)
    elif args.json:
        from turbofit.report.saved import saved_json

        answer(saved_json(saved))
    else:
        from turbofit.report.plan_view import plan_view

        show(plan_view(saved.plan, saved.run), markdown=args.md)
    return 0 if saved.plan.fits else DoesNotFitError.exit_code


def _page(saved: Saved, file: str) -> None:
    from turbofit.cli.output import answer
    from turbofit.core.files import write_atomic
    from turbofit.report.page.build import page

    text = page(saved)
    if file == "-":
        answer(text)
        return
    write_atomic(file, text)
    answer(f"{file}\n")
