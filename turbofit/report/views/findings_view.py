"""The findings of `doctor` on a machine and of `diagnose` in a log."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from turbofit.core.units import format_bytes
from turbofit.report.painters.document import (
    Code,
    Heading,
    Items,
    Paragraph,
    in_brief,
    known_facts,
    listed,
    remark,
    table,
)
from turbofit.report.views.figures import shell_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.logs.answer import Diagnosis, Missing
    from turbofit.planning.checks import DoctorReport, Finding
    from turbofit.planning.examine.scene import State
    from turbofit.report.painters.document import Block, Tone

#: The most characters of a plan's verdict, which are two lines of 100 columns.
_VERDICT: Final = 190
#: Usual values of settings, which the answer leaves out.
_USUAL: Final = (("quant_policy", 0), ("replicas", 1))
#: For each state a heading, and the words after the count 1 and after larger counts; worst first.
_STATES: Final[dict[State, tuple[str, str, str]]] = {
    "stops": ("Stops serving", "stops serving", "stop serving"),
    "warning": ("Warnings", "warning", "warnings"),
    "unreadable": ("Could not be read", "could not be read", "could not be read"),
    "ok": ("In order", "in order", "in order"),
}


def doctor_view(report: DoctorReport, *, full: bool) -> Iterator[Block]:
    """Yield the findings, worst first.

    Checks that found no fault share a line, unless ``full`` is true.
    """
    counted = {state: report.count(state) for state in _STATES}
    counts = ", ".join(f"{n} {_STATES[state][1 + (n > 1)]}" for state, n in counted.items() if n)
    known = f"{report.machine} ({report.source})"
    yield Heading(known if report.machine else "no GPU that can be read")
    tone: Tone = "warn" if report.count("warning") else "good"
    if report.exit_code:
        tone = "bad"
    yield Paragraph(counts, tone=tone)
    for state in _STATES:
        findings = [finding for finding in report.findings if finding.state == state]
        if findings and state == "ok":
            yield from _in_order(findings, full=full)
        elif findings:
            yield Heading(_STATES[state][0])
            for finding in findings:
                text = f"{finding.check}: {finding.seen}"
                yield Paragraph(text, tone="bad" if state == "stops" else "warn")
                yield known_facts({"why": finding.why, "fix": finding.fix})


def _in_order(findings: Sequence[Finding], *, full: bool) -> Iterator[Block]:
    """Yield the findings without a fault: a table if ``full``, else a line of names."""
    title = _STATES["ok"][0]
    if full:
        yield Heading(title)
        rows = ((finding.check, finding.seen) for finding in findings)
        yield table(("check", "seen"), rows, wrap=("seen",))
    else:
        yield Heading(f"{title} (--full shows what was seen)")
        yield Paragraph(", ".join(finding.check for finding in findings))


def diagnosis_view(diagnosis: Diagnosis) -> Iterator[Block]:
    """Yield the cause, the first step and the run that would work, then all other facts.

    For a lack of memory, cause, step and run are in the first twenty lines of 100 columns.
    """
    yield Heading("What happened")
    yield Paragraph(diagnosis.what, tone="bad" if diagnosis.phase != "none" else "plain")
    yield known_facts({"do first": diagnosis.first})
    if diagnosis.known:
        yield from _would_work(diagnosis)
    yield Heading("What is known of it")
    yield known_facts(_facts(diagnosis))
    yield from listed("Why" if diagnosis.known else "Where", diagnosis.why)
    if diagnosis.others is not None:
        title = "Others who met this message had (the list is not complete)"
        yield from listed(title, diagnosis.others.had)
        yield from listed("What to try", diagnosis.others.tried)
    yield from _held(diagnosis)
    if not diagnosis.known:
        yield from _would_work(diagnosis)
    yield from listed("What to change", diagnosis.changes)
    yield from listed("What to send", diagnosis.send)
    yield from listed("What is unknown", diagnosis.unknown, "dim")
    yield from listed("Also in this log", diagnosis.also, "dim")
    if diagnosis.evidence:
        yield Heading("Lines that prove this answer")
        evidence = ((str(row.line), row.tells, row.text[:160]) for row in diagnosis.evidence)
        yield table(("line", "tells", "text"), evidence, right=("line",), wrap=("tells", "text"))
    if not diagnosis.known:
        yield remark("without a cause the exit code is 3")


def _held(diagnosis: Diagnosis) -> Iterator[Block]:
    """Yield a table of the processes and parts that held the memory."""
    if not diagnosis.held:
        return
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


def _facts(diagnosis: Diagnosis) -> dict[str, str | None]:
    """Return by name what the log says of the engine's end, the model and the machine."""
    read = diagnosis.read
    return {
        "kind": diagnosis.kind,
        "phase": diagnosis.phase,
        "missing": _missing(diagnosis.missing),
        "missing in all": _missing(diagnosis.missing_in_all),
        "model": read.model,
        "machine": read.machine,
        "engine": read.engine,
        "lmdeploy": read.version if read.engine in (None, "turbomind") else None,
    }


def _missing(missing: Missing | None) -> str:
    """Return in words how many bytes were missing, by which source, and how many more it may be."""
    if missing is None:
        return ""
    if missing.bytes is None:
        return f"unknown: {missing.note}"
    text = f"{_size(missing.bytes)} ({missing.bytes:,} bytes, {missing.note}; {missing.basis}"
    return f"{text}, up to {_size(missing.doubt)} more)" if missing.doubt else f"{text})"


def _would_work(diagnosis: Diagnosis) -> Iterator[Block]:
    """Yield the run that would work: its verdict, its settings in one row, and its command."""
    if (advice := diagnosis.would_work) is None:
        return
    worked = diagnosis.known and advice.fits is not None
    title = "What would have worked" if worked else "What turbofit would run"
    yield Heading(f"{title}: {advice.model} on {advice.on}")
    tones: dict[bool | None, Tone] = {True: "good", False: "bad", None: "warn"}
    yield Paragraph(in_brief(advice.verdict, _VERDICT), tone=tones[advice.fits])
    shown = (pair for pair in advice.settings.items() if pair not in _USUAL)
    yield known_facts({"settings": ", ".join(f"{name} {value}" for name, value in shown)})
    if advice.command:
        yield Code(shell_words(shlex.split(advice.command)))
    if advice.note:
        yield remark(advice.note)
    if advice.remedies:
        yield Items(tuple(remedy.text for remedy in advice.remedies))


def _size(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)
