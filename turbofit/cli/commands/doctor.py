"""``turbofit doctor``: what on this machine would stop an engine, each with a fix."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from turbofit.cli.command import Option, command
from turbofit.cli.commands.completion import complete_model
from turbofit.cli.options.common_options import FORMS, FULL, PORT, spec_option
from turbofit.cli.terminal.output import Form

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.planning.checks import DoctorReport
    from turbofit.planning.examine.scene import State
    from turbofit.report.painters.document import Block, Tone

#: What is said behind a number, behind one and behind more; what stops comes first.
_COUNTED: Final[dict[State, tuple[str, str]]] = {
    "stops": ("stops serving", "stop serving"),
    "warning": ("warning", "warnings"),
    "unreadable": ("could not be read", "could not be read"),
    "ok": ("in order", "in order"),
}
_TITLES: Final[dict[State, str]] = {
    "stops": "Stops serving",
    "warning": "Warnings",
    "unreadable": "Could not be read",
    "ok": "In order",
}


@command(
    spec_option(),
    Option("--model", shell_complete=complete_model),
    Option("--port", type=PORT),
    FULL,
    *FORMS,
    only_linux=True,
)
def doctor(*, on: str | None, model: str | None, port: int | None, form: Form) -> int:
    """Examine and show; exit 3 where something stops serving, 4 without a readable machine."""
    from turbofit.planning.checks import examine

    served = None
    if model:
        from turbofit.model.source import resolve_model

        served = resolve_model(model)
    report = examine(on=on, model=served, port=port)
    form._replace(full=True).show(report, partial(_view, full=form.full or form.md))
    return report.exit_code


def _view(report: DoctorReport, *, full: bool) -> Iterator[Block]:
    """What stops first; what is in order last, in a line where ``full`` is not asked for."""
    from turbofit.report.painters.document import Heading, Paragraph, known_facts, table

    counted = {state: report.count(state) for state in _COUNTED}
    counts = ", ".join(f"{n} {_COUNTED[state][n > 1]}" for state, n in counted.items() if n)
    known = f"{report.machine} ({report.source})"
    yield Heading(known if report.machine else "no GPU that can be read")
    tone: Tone = "bad" if report.exit_code else "warn" if report.count("warning") else "good"
    yield Paragraph(counts, tone=tone)
    for state, title in _TITLES.items():
        findings = [finding for finding in report.findings if finding.state == state]
        if not findings:
            continue
        if state == "ok" and not full:
            yield Heading(f"{title} (--full shows what was seen)")
            yield Paragraph(", ".join(finding.check for finding in findings))
            continue
        yield Heading(title)
        if state == "ok":
            rows = ((finding.check, finding.seen) for finding in findings)
            yield table(("check", "seen"), rows, wrap=("seen",))
            continue
        tone = "bad" if state == "stops" else "warn"
        for finding in findings:
            yield Paragraph(f"{finding.check}: {finding.seen}", tone=tone)
            yield known_facts({"why": finding.why, "fix": finding.fix})
