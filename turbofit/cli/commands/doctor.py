"""``turbofit doctor`` and ``diagnose``: what here would stop an engine, and what stopped one."""

from __future__ import annotations

import os
import re
import shlex
import sys
from functools import partial
from typing import TYPE_CHECKING, Final

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS, FULL, PORT, spec_option
from turbofit.cli.options.completions import complete_model
from turbofit.cli.terminal.output import Form
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.diagnose.answer import Advice, Diagnosis, Missing
    from turbofit.planning.checks import DoctorReport, Finding
    from turbofit.planning.examine.scene import State
    from turbofit.report.painters.document import Block, Tone

#: A heading, and what is said behind one and behind more; what stops comes first.
_STATES: Final[dict[State, tuple[str, str, str]]] = {
    "stops": ("Stops serving", "stops serving", "stop serving"),
    "warning": ("Warnings", "warning", "warnings"),
    "unreadable": ("Could not be read", "could not be read", "could not be read"),
    "ok": ("In order", "in order", "in order"),
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
    form._replace(full=True).show(report, partial(_doctor_view, full=form.full or form.md))
    return report.exit_code


def _doctor_view(report: DoctorReport, *, full: bool) -> Iterator[Block]:
    """What stops first; what is in order last, in a line where ``full`` is not asked for."""
    from turbofit.report.painters.document import Heading, Paragraph

    counted = {state: report.count(state) for state in _STATES}
    counts = ", ".join(f"{n} {_STATES[state][1 + (n > 1)]}" for state, n in counted.items() if n)
    known = f"{report.machine} ({report.source})"
    yield Heading(known if report.machine else "no GPU that can be read")
    tone: Tone = "bad" if report.exit_code else "warn" if report.count("warning") else "good"
    yield Paragraph(counts, tone=tone)
    for state in _STATES:
        findings = [finding for finding in report.findings if finding.state == state]
        if findings:
            blocks = _in_order(findings, full=full) if state == "ok" else _wrong(state, findings)
            yield from blocks


def _wrong(state: State, findings: Sequence[Finding]) -> Iterator[Block]:
    """Findings that are not in order, each with its reason and its fix."""
    from turbofit.report.painters.document import Heading, Paragraph, known_facts

    yield Heading(_STATES[state][0])
    for finding in findings:
        tone: Tone = "bad" if state == "stops" else "warn"
        yield Paragraph(f"{finding.check}: {finding.seen}", tone=tone)
        yield known_facts({"why": finding.why, "fix": finding.fix})


def _in_order(findings: Sequence[Finding], *, full: bool) -> Iterator[Block]:
    from turbofit.report.painters.document import Heading, Paragraph, table

    title = _STATES["ok"][0]
    if full:
        yield Heading(title)
        rows = ((finding.check, finding.seen) for finding in findings)
        yield table(("check", "seen"), rows, wrap=("seen",))
    else:
        yield Heading(f"{title} (--full shows what was seen)")
        yield Paragraph(", ".join(finding.check for finding in findings))


_NOT_KNOWN: Final = 3
_NO_TEXT: Final = (".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".mp4", ".pdf", ".png", ".webp")
#: A word that is a message by itself, and no file's name: Killed, OutOfMemoryError.
_MESSAGE: Final = "[A-Z][A-Za-z]*(?:ed|[Ee]rror|[Ee]xception)"


@command(
    Argument("log", metavar="LOG", type=PATH),
    Option("--model", shell_complete=complete_model),
    spec_option(),
    *FORMS,
)
def diagnose(log: str, model: str | None, on: str | None, form: Form) -> int:
    """Read, explain, show; exit 3 where the log proves no cause."""
    from turbofit.diagnose.explain import diagnose as explain

    diagnosis = explain(_chunks(log), model=model, on=on)
    form.show(diagnosis, _diagnosis_view)
    return 0 if diagnosis.known else _NOT_KNOWN


def _chunks(path: str) -> Iterator[bytes]:
    from turbofit.diagnose.rows import chunks_of

    several = any(sign.isspace() for sign in path.strip())
    if path.lower().endswith(_NO_TEXT) and (os.path.exists(path) or not several):
        hint = "paste the message in quotes, or name the log: turbofit diagnose serve.log"
        raise UsageError(f"{path} is by its name no text, which diagnose reads", hint=hint)
    try:
        if path == "-":
            yield from chunks_of(sys.stdin.buffer)
            return
        with open(path, "rb") as file:
            yield from chunks_of(file)
    except OSError as exc:
        if several or re.fullmatch(_MESSAGE, path):
            yield path.encode()
            return
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="name a log file, - for stdin, or give the log itself in quotes",
        ) from None


def _diagnosis_view(diagnosis: Diagnosis) -> Iterator[Block]:
    """The answer first, then what it rests on."""
    from turbofit.report.painters.document import (
        Heading,
        Paragraph,
        known_facts,
        listed,
        remark,
        table,
    )

    yield Heading("What happened")
    yield Paragraph(diagnosis.what, tone="bad" if diagnosis.phase != "none" else "plain")
    yield known_facts({"do first": _first_step(diagnosis)} | _facts(diagnosis))
    yield from listed("Why" if diagnosis.known else "Where", diagnosis.why)
    if diagnosis.others is not None:
        title = "Others who met this message had (the list is not complete)"
        yield from listed(title, diagnosis.others.had)
        yield from listed("What to try", diagnosis.others.tried)
    if diagnosis.held:
        yield Heading("Who held the memory")
        rows = (
            (
                "" if holding.gpu is None else str(holding.gpu),
                holding.who,
                _size(holding.bytes),
                ",".join(map(str, holding.lines)),
            )
            for holding in diagnosis.held
        )
        titles = ("GPU", "who", "size", "lines")
        yield table(titles, rows, right=("GPU", "size", "lines"), wrap=("who",))
    if diagnosis.would_work is not None:
        worked = diagnosis.known and diagnosis.would_work.fits is not None
        title = "What would have worked" if worked else "What turbofit would run"
        yield from _advice(title, diagnosis.would_work)
    yield from listed("What to change", diagnosis.changes)
    yield from listed("What to send", diagnosis.send)
    yield from listed("What is unknown", diagnosis.unknown, "dim")
    yield from listed("Also in this log", diagnosis.also, "dim")
    if diagnosis.evidence:
        yield Heading("It rests on these lines")
        evidence = ((str(row.line), row.tells, row.text[:160]) for row in diagnosis.evidence)
        yield table(("line", "tells", "text"), evidence, right=("line",), wrap=("tells", "text"))
    if not diagnosis.known:
        yield remark("without a cause the exit code is 3")


def _first_step(diagnosis: Diagnosis) -> str:
    """What tells where it ran out, else the surest change; else what others tried, or to send."""
    tried = diagnosis.others.tried if diagnosis.others else ()
    lacking = diagnosis.send if diagnosis.known else ()
    return next(iter((*lacking, *diagnosis.changes, *tried, *diagnosis.send)), "")


def _facts(diagnosis: Diagnosis) -> dict[str, str | None]:
    read = diagnosis.read
    return {
        "kind": diagnosis.kind,
        "phase": diagnosis.phase,
        "missing": _missing(diagnosis.missing),
        "missing in all": _missing(diagnosis.missing_in_all),
        "model": read.model,
        "machine": read.machine,
        "engine": read.engine,
        "lmdeploy": read.version,
    }


def _missing(missing: Missing | None) -> str:
    if missing is None:
        return ""
    if missing.bytes is None:
        return f"unknown: {missing.note}"
    text = f"{_size(missing.bytes)} ({missing.bytes:,} bytes, {missing.note}; {missing.basis}"
    return f"{text}, up to {_size(missing.doubt)} more)" if missing.doubt else f"{text})"


def _advice(title: str, advice: Advice) -> Iterator[Block]:
    from turbofit.report.painters.document import Code, FactList, Heading, Items, Paragraph, remark
    from turbofit.report.views.figures import shell_words

    yield Heading(f"{title}: {advice.model} on {advice.on}")
    tones: dict[bool | None, Tone] = {True: "good", False: "bad", None: "warn"}
    yield Paragraph(advice.verdict, tone=tones[advice.fits])
    if advice.settings:
        yield FactList(tuple((name, str(value)) for name, value in advice.settings.items()))
    if advice.note:
        yield remark(advice.note)
    if advice.command:
        yield Code(shell_words(shlex.split(advice.command)))
    if advice.remedies:
        yield Items(tuple(remedy.text for remedy in advice.remedies))


def _size(value: int | None) -> str:
    from turbofit.core.units import format_bytes

    return "unknown" if value is None else format_bytes(value)
