"""``turbofit report PLAN|RUN|latest``: what was planned, rehearsed or served, again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.report.schema import NAMES

if TYPE_CHECKING:
    from turbofit.core.tuning import Tuning
    from turbofit.load.result import LoadResult

__all__ = ["report"]


@command(
    Argument(
        "what",
        metavar="PLAN|RUN|latest",
        required=False,
        type=PATH,
        explained="what `plan --json` wrote (- for stdin), or `bench` or `tune`; the folder of a "
        "run of `serve`; or `latest`: the newest plan, prediction, rehearsal or run",
    ),
    *FORMS,
    Option(
        "--html",
        form=True,
        metavar="FILE",
        type=PATH,
        help="one page that needs no network; - for stdout",
    ),
    Option(
        "--schema",
        form=True,
        is_flag=False,
        flag_value=NAMES[0],
        type=click.Choice(NAMES),
        help=f"the JSON Schema of a document instead (default {NAMES[0]})",
    ),
)
def report(
    *, what: str | None, html: str | None, schema: str | None, as_json: bool, md: bool
) -> int:
    """Read and show; exit 3 where the plan does not fit."""
    from turbofit.cli.terminal.output import answer, show

    if schema:
        from turbofit.report.schema import schema_text

        answer(schema_text(schema))
        return 0
    if what is None:
        raise UsageError("report needs a plan, a run or latest", hint="turbofit report latest")
    from turbofit.report.stored_documents import StoredPlan, read_reported

    saved = read_reported(what)
    if not isinstance(saved, StoredPlan):
        return _measured(saved, html, as_json=as_json, md=md)
    if html:
        from turbofit.cli.terminal.output import write_page
        from turbofit.report.page.build import page

        write_page(page(saved), html)
    elif as_json:
        from turbofit.report.stored_documents import saved_json

        answer(saved_json(saved))
    else:
        from turbofit.report.views.plan.plan_view import plan_view

        show(plan_view(saved.plan, saved.run), markdown=md)
    return 0 if saved.plan.fits else DoesNotFitError.exit_code


def _measured(one: LoadResult | Tuning, html: str | None, *, as_json: bool, md: bool) -> int:
    """A load or a tuning as its command shows it."""
    from turbofit.core.tuning import Tuning

    if isinstance(one, Tuning):
        from turbofit.cli.commands.tune import show_tuning

        show_tuning(one, html, as_json=as_json, md=md)
    else:
        from turbofit.cli.commands.bench import show_load

        show_load(one, html, as_json=as_json, md=md)
    return 0
