"""``turbofit compare A B``: two plans side by side."""

from __future__ import annotations

from typing import Final

from turbofit.cli.command import PATH, Argument, command
from turbofit.cli.options.common_options import FORMS, FULL
from turbofit.cli.terminal.output import Form

_WHAT: Final = "a plan, prediction or rehearsal that was saved, a run's folder, or latest"


@command(
    Argument("a", metavar="A", type=PATH, explained=_WHAT),
    Argument("b", metavar="B", type=PATH),
    FULL,
    *FORMS,
)
def compare(a: str, b: str, form: Form) -> int:
    from turbofit.report.compare import compare, compare_view
    from turbofit.report.stored_documents import read_saved

    form.show(compare(read_saved(a), read_saved(b)), compare_view)
    return 0
