"""``turbofit compare A B``: two plans side by side."""

from __future__ import annotations

from typing import Final

from turbofit.cli.command import PATH, Argument, command
from turbofit.cli.options.common_options import FORMS, FULL

__all__ = ["compare"]


_WHAT: Final = "a plan, prediction or rehearsal that was saved, a run's folder, or latest"


@command(
    Argument("a", metavar="A", type=PATH, explained=_WHAT),
    Argument("b", metavar="B", type=PATH, explained="another one"),
    FULL,
    *FORMS,
)
def compare(a: str, b: str, full: bool, as_json: bool, md: bool) -> int:
    """Read both and show what differs."""
    from turbofit.cli.terminal.output import show_form
    from turbofit.report.compare import compare, compare_view
    from turbofit.report.stored_documents import read_saved

    found = compare(read_saved(a), read_saved(b))
    show_form(found, compare_view, as_json=as_json, md=md, short=not full)
    return 0
