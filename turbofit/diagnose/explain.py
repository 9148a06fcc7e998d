"""From a log to its answer: the earliest cause, its advice, and what stays unknown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.version import REFERENCE
from turbofit.diagnose.advice import advice
from turbofit.diagnose.answer import Diagnosis, Others, Read
from turbofit.diagnose.case import LogCase
from turbofit.diagnose.facts import read_runs
from turbofit.diagnose.rows import rows
from turbofit.diagnose.rules.causes import what_to_send
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, raised_in, without_secrets
from turbofit.diagnose.rules.figures import refused_by
from turbofit.diagnose.rules.rules_engine import engine_rules
from turbofit.diagnose.rules.rules_hang import hang_rules
from turbofit.diagnose.rules.rules_host import host_rules, peer_meaning, quiet_rules
from turbofit.diagnose.rules.rules_legacy import legacy_rules
from turbofit.diagnose.rules.rules_torch import torch_rules
from turbofit.observe.log_events import (
    CacheBudget,
    CudaError,
    KnownMessage,
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    PythonError,
    Slab,
)
from turbofit.observe.log_reader import read_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.diagnose.answer import Advice
    from turbofit.diagnose.facts import LogEvent, LogFacts

_RULES: Final = (
    engine_rules,
    legacy_rules,
    torch_rules,
    hang_rules,
    host_rules,
    quiet_rules,
)
#: What a parent says of a child that ended: the child's own error goes before it.
_PARENTS: Final = ("aborted", "crashed", "engine_gone", "killed", "request_failed")
#: Notices that say why something ended: they go before that it did.
_REASONS: Final = {
    "request_failed": ("request_rejected", "bad_image", "wrong_model_name"),
    "aborted": ("interrupted",),
    "engine_gone": ("interrupted",),
}
#: Notices of the machine, which say nothing of an error in the same log.
_OF_MACHINE: Final = ("memory_table", "peer_warning")
_RANKS: Final = {"cause": 0, "refusal": 1, "consequence": 2, "notice": 3}


def diagnose(
    chunks: Iterable[bytes], *, model: str | None = None, on: str | None = None
) -> Diagnosis:
    """Explain a log.

    Args:
        chunks: its bytes, in pieces.
        model: the model, where the log does not name it or names it wrongly.
        on: the machine, likewise.

    Raises:
        UsageError: ``model`` or ``on`` cannot be meant.
    """
    runs = read_runs(rows(chunks))
    cases = [LogCase(facts, model=model, on=on) for facts in runs]
    drafts = sorted(
        ((draft, case) for case in cases for rule in _RULES for draft in rule(case)),
        key=lambda pair: (_RANKS[pair[0].rank], pair[0].line),
    )
    if not drafts:
        return _unknown(cases[-1], _last_error(cases[-1]), ())
    reasons = _REASONS.get(drafts[0][0].kind, ())
    drafts.sort(key=lambda pair: pair[0].kind not in reasons)
    best, of_run = drafts[0]
    also = {
        draft.kind: _in_short(draft)
        for draft, _ in reversed(drafts[1:])
        if draft.kind != best.kind and draft.rank != "notice"
    }
    last = of_run.event.last
    told_less = best.rank in ("refusal", "notice") and best.kind != "interrupted"
    if last is not None and (
        best.kind in (*_PARENTS, *_OF_MACHINE) or (told_less and last.line > best.line)
    ):
        return _unknown(of_run, _last_error(of_run), (_in_short(best),))
    answer = _answer if best.what else _unknown
    return answer(of_run, best, tuple(reversed(also.values())))


def _in_short(draft: RuleAnswer) -> str:
    return f"line {draft.line}: {draft.what or draft.quoted}"


def _answer(case: LogCase, draft: RuleAnswer, also: tuple[str, ...]) -> Diagnosis:
    would_work, lacks = _plan(case, draft)
    peers = case.facts.first(PeerMissing)
    why, lines = draft.why, draft.evidence
    if peers and draft.kind != "peer_warning":
        why = (*why, f"the peer access warning is not the cause: {peer_meaning()}")
        lines = (*lines, evidence(peers, "GPUs without peer access"))
    return Diagnosis(
        kind=draft.kind,
        phase=draft.phase,
        what=draft.what,
        why=why,
        held=draft.held,
        missing=draft.missing,
        missing_in_all=draft.missing_in_all,
        changes=_changes(case, draft, would_work),
        would_work=would_work,
        send=draft.send,
        unknown=tuple(dict.fromkeys((*draft.unknown, *lacks))),
        also=also,
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        read=_read(case),
    )


def _changes(case: LogCase, draft: RuleAnswer, planned: Advice | None) -> tuple[str, ...]:
    """What to change; a model in few bits has no variant in fewer.

    Where the plan fits, the cards are enough: nothing asks for more, and what would help a load
    comes last.
    """
    changes = draft.changes
    if case.model is not None and case.model.quantization is not None:
        changes = tuple(
            change.replace("a quantised variant", "a smaller model") for change in changes
        )
    if planned is None or not planned.fits:
        return changes
    enough = (change.replace(", or more cards", "") for change in changes)
    return tuple(sorted(enough, key=lambda change: change.startswith("while it was loading")))


def _plan(case: LogCase, draft: RuleAnswer) -> tuple[Advice | None, tuple[str, ...]]:
    if not draft.planned:
        return None, ()
    would_work, lacks = advice(case, draft), []
    if would_work is None and case.model is None:
        name = case.facts.subject.unknown_model
        lacks.append(
            f"what {name} is: it has no preset here, so name its folder or a preset with --model"
            if name
            else "which model it was: name it with --model"
        )
    if would_work is None and case.machine is None:
        lacks.append(f"which machine it was: {case.no_machine or 'name it with --on'}")
    return would_work, tuple(lacks)


def _unknown(case: LogCase, draft: RuleAnswer, also: tuple[str, ...]) -> Diagnosis:
    """No cause is proven: a message that a rule knows, or the last error."""
    what = draft.what or f"{_NO_CAUSE}: {_start_of(draft.quoted)}"
    others = Others(message=draft.kind, had=draft.possible, tried=draft.changes)
    about = " ".join((what, *case.facts.subject.programs))
    errors = case.facts.every(PythonError)
    if errors and not errors[-1][0].stack:
        about += " (no traceback)"
    if case.facts.lines <= _SHORT and not case.facts.commanded:
        about += " (short log)"
    would_work, lacks = _plan(case, draft)
    return Diagnosis(
        kind="unknown",
        phase="unknown",
        what=what,
        others=others if draft.possible else None,
        why=draft.why,
        also=also,
        evidence=draft.evidence,
        would_work=would_work,
        unknown=("what caused it" if draft.evidence else "what happened", *lacks),
        send=what_to_send(about),
        read=_read(case),
    )


def _start_of(line: str) -> str:
    """The beginning of a line that is longer than a message: a text in which one stands."""
    return line if len(line) < _LONG_LINE else f"{line[: _LONG_LINE // 2]}…"


def _last_error(case: LogCase) -> RuleAnswer:
    """What the last exception says, and whether that is a check's sentence; else a line."""
    messages = case.facts.every(KnownMessage)
    errors = case.facts.every(PythonError) or [
        (mark, error)
        for mark, _ in messages
        if isinstance(error := read_line(mark.text), PythonError)
    ]
    if errors:
        last, error = errors[-1]
        text = without_secrets(error.message or (last.stack[-1].code if last.stack else ""))
        checked = refused_by(last.stack, error.name)
        passed_on = len(errors) > 1 and errors[-2][0].line < case.facts.passed_on
        if checked and " " in text.strip() and not passed_on:
            what = f"{_NO_CAUSE}: {checked} stopped at a check of its own: {text}"
            return replace(_quote(last, what), possible=_CHECKED, changes=_CHECK_AGAIN)
        what = f"turbofit does not know this error: {error.name}: {text}"
        return _quote(last, what.rstrip(": "))
    line = case.facts.last_complaint or (messages[-1][0] if messages else None)
    line = line or (None if case.facts.calm else case.facts.last_refusal)
    if line is None:
        what = _QUIET if case.facts.calm else _FOREIGN
        known = case.model is not None and case.machine is not None
        return RuleAnswer(kind="", line=0, what=what, planned=known and not case.facts.calm)
    text = evidence(line, "").text
    if _WARNING.match(text):
        return _quote(line, f"this log has a warning, and no error: {text}", "the last warning")
    what = "turbofit does not know this message"
    if line.stack and line.text == line.stack[-1].code:
        what = "turbofit does not know the error of the traceback that ends at"
    return _quote(line, f"{what}: {text}")


def _quote(mark: LogEvent, what: str, tells: str = "the last error") -> RuleAnswer:
    return RuleAnswer(
        kind="check_failed",
        line=mark.line,
        what=what,
        why=raised_in(mark),
        evidence=(evidence(mark, tells),),
    )


#: Not NCCL's, whose errors have that level.
_WARNING: Final = re.compile(r"(?!.*NCCL WARN).{0,60}?\bWARN(?:ING)?\b|.{0,240}?[a-z]Warning: ")
#: Why a program's own check fails.
_CHECKED: Final = (
    "what it was given or found here (an option, the model, a file, the card, a version) is not"
    " what this release takes: its sentence says which",
    "a fault of this release",
)
_CHECK_AGAIN: Final = (
    "what the sentence names, compared with the page of the model and --help of the program; a"
    " newer release of it",
)
#: The beginning of an answer about a message whose cause it does not tell.
_NO_CAUSE: Final = "turbofit does not know the cause from this log"
#: A log of whose lines none is of an error; what its program did is not known.
_QUIET: Final = "no line of this log tells of an error"
_FOREIGN: Final = "this log has nothing that turbofit recognises"
#: A line of so many characters is cut where it is quoted first; its evidence has more of it.
_LONG_LINE: Final = 200
#: Lines up to which a log does not tell which program it is of.
_SHORT: Final = 3


def _read(case: LogCase) -> Read:
    facts, subject = case.facts, case.facts.subject
    named = case.model.name if case.model else None
    return Read(
        lines=facts.lines,
        engine=_engine(facts),
        version=subject.version or _generation(facts),
        model=named,
        machine=case.on,
        tp=case.tp,
        settings=dict(subject.options),
    )


def _engine(facts: LogFacts) -> str | None:
    turbomind = (CacheBudget, Slab, KvBlocks, LegacyCuda, CudaError, PeerMissing)
    if any(isinstance(m.event, turbomind) for m in facts.marks):
        return "turbomind"
    programs = facts.subject.programs - {"lmdeploy"}
    return next(iter(programs)) if len(facts.subject.programs) == len(programs) == 1 else None


def _generation(facts: LogFacts) -> str | None:
    """LMDeploy's generation by its lines, where no version is printed."""
    if facts.first(CacheBudget) or facts.first(Slab):
        return f"0.15 to {REFERENCE}"
    if facts.first(PeerMissing):
        return "0.2 to 0.7"
    if facts.first(LegacyCuda):
        return "0.2 to 0.13"
    return "0.2 to 0.14" if facts.first(KvBlocks) else None
