"""``turbofit report``: shows stored plans, rehearsals and runs, and shares a run."""

from __future__ import annotations

from typing import Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal.output import Form, answer, note, show
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.report.schema import NAMES

_MOST_LISTED: Final = 20


@command(
    Argument("what", metavar="PLAN|RUN|latest", required=False, type=PATH),
    *common.FORMS,
    common.HTML,
    Option(
        "--schema",
        form=True,
        is_flag=False,
        flag_value=NAMES[0],
        type=click.Choice(NAMES),
        help=f"the JSON Schema of a document instead (default {NAMES[0]})",
    ),
    Option("--share", is_flag=True),
    Option("--out", metavar="FILE", type=PATH),
)
def report(
    *,
    what: str | None,
    schema: str | None,
    share: bool,
    out: str | None,
    form: Form,
) -> int:
    """Read a document and show it; exit 3 if the plan does not fit."""
    if share and not schema:
        return _share(what, out, form)
    if out is not None:
        raise UsageError("--out is for --share", hint="add --share, or remove --out")
    if schema:
        from turbofit.report.schema import schema_text

        answer(schema_text(schema))
        return 0
    if what is None:
        if form.html or form.as_json:
            raise UsageError(
                "report needs a plan, a run or latest", hint="turbofit report lists them"
            )
        from turbofit.report.painters.document import Paragraph, table
        from turbofit.report.stored_documents import reportable, summary

        nothing = Paragraph("nothing was planned, rehearsed or served yet: turbofit plan MODEL")
        rows = list(map(summary, reportable()[:_MOST_LISTED]))
        listed = table(("report", "of", "when"), rows, wrap=("report", "of"))
        show([listed if rows else nothing], markdown=form.md)
        return 0
    from turbofit.report.stored_documents import LATEST, read_saved, saved_document
    from turbofit.report.views.plan_view import plan_view

    saved = read_saved(what)
    plan, run = saved.plan, saved.run
    if what == LATEST and not form.as_json:
        note(f"latest is {saved.where}, planned {plan.created}")
    form.show(saved_document(saved), lambda _: plan_view(plan, run))
    return 0 if plan.fits else DoesNotFitError.exit_code


def _share(run: str | None, out: str | None, form: Form) -> int:
    """Show what others may read of a run; write that document to ``out``, if a file is given."""
    import msgspec

    from turbofit.core.process.files import write_output
    from turbofit.report.share import share_view, shared
    from turbofit.report.stored_documents import read_run

    try:
        saved = read_run(run)
    except UsageError as exc:
        if run is None:  # the usual hint has `--pretend`, and `--share` refuses such a run
            exc.hint = "turbofit serve MODEL, or calibrate MODEL, on real cards makes a run"
        raise
    document = shared(saved)
    form.show(document, share_view)
    if out is not None:
        # An issue may have 65,536 characters; indented JSON of eight cards has more.
        write_output(out, msgspec.json.encode(document).decode() + "\n")
        note(f"{out} is written: read it, then paste it into an issue of the kind My card")
    return 0
