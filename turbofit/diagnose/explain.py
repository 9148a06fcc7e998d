"""From a log to its answer: the earliest cause, its advice, and what stays unknown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.version import REFERENCE
from turbofit.diagnose.advice import advice
from turbofit.diagnose.answer import Diagnosis, Read
from turbofit.diagnose.case import LogCase
from turbofit.diagnose.facts import read_runs
from turbofit.diagnose.rows import rows
from turbofit.diagnose.rules.causes import what_to_send
from turbofit.diagnose.rules.draft import evidence, raised_in, without_secrets
from turbofit.diagnose.rules.figures import package_of, refused_by
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

    from turbofit.diagnose.answer import Evidence
    from turbofit.diagnose.facts import LogFacts
    from turbofit.diagnose.rules.draft import RuleAnswer

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
        return _unknown(cases[-1])
    reasons = _REASONS.get(drafts[0][0].kind, ())
    drafts.sort(key=lambda pair: pair[0].kind not in reasons)
    best, of_run = drafts[0]
    last = of_run.event.last
    told_less = best.rank in ("refusal", "notice") and best.kind != "interrupted"
    if last is not None and (
        best.kind in (*_PARENTS, *_OF_MACHINE) or (told_less and last.line > best.line)
    ):
        return _unknown(of_run, f"line {best.line}: {best.what}")
    also = {
        draft.kind: f"line {draft.line}: {draft.what}"
        for draft, _ in reversed(drafts[1:])
        if draft.kind != best.kind and draft.rank != "notice"
    }
    return _answer(of_run, best, tuple(reversed(also.values())))


def _answer(case: LogCase, draft: RuleAnswer, also: tuple[str, ...]) -> Diagnosis:
    unknown = list(draft.unknown)
    if draft.possible and not unknown:
        unknown.append(_UNDECIDED)
    would_work = None
    if draft.planned:
        would_work = advice(case, draft)
        if would_work is None:
            if case.model is None:
                name = case.facts.subject.unknown_model
                unknown.append(
                    f"what {name} is: it has no preset here, so name its folder or a preset with"
                    " --model"
                    if name
                    else "which model it was: name it with --model"
                )
            if case.machine is None:
                unknown.append(f"which machine it was: {case.no_machine or 'name it with --on'}")
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
        possible=draft.possible,
        held=draft.held,
        missing=draft.missing,
        missing_in_all=draft.missing_in_all,
        changes=draft.changes,
        would_work=would_work,
        unknown=tuple(dict.fromkeys(unknown)),
        also=also,
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        read=_read(case),
    )


def _unknown(case: LogCase, *also: str) -> Diagnosis:
    """No rule knows it: what the last exception says, and whether that is a check's sentence."""
    messages = case.facts.every(KnownMessage)
    errors = case.facts.every(PythonError) or [
        (mark, error)
        for mark, _ in messages
        if isinstance(error := read_line(mark.text), PythonError)
    ]
    kind, possible = "unknown", tuple[str, ...]()
    what = "this log has nothing that turbofit recognises"
    last = case.facts.last_complaint or (messages[-1][0] if messages else None)
    if errors:
        last, error = errors[-1]
        text = error.message or (last.stack[-1].code if last.stack else "")
        text = without_secrets(text)
        what = f"turbofit does not know this error: {error.name}: {text}".rstrip(": ")
        checked = refused_by(last.stack, error.name)
        passed_on = len(errors) > 1 and errors[-2][0].line < case.facts.passed_on
        if checked and " " in text.strip() and not passed_on:
            what = f"{checked} stopped at a check of its own: {text}"
            kind, possible = "check_failed", _CHECKED
    lines: tuple[Evidence, ...] = (evidence(last, "the last error"),) if last else ()
    if last and not errors:
        what = f"turbofit does not know this message: {lines[0].text}"
        if _WARNING.match(lines[0].text):
            what = f"this log has a warning, and no error: {lines[0].text}"
            lines = (evidence(last, "the last warning"),)
    if not lines and case.facts.calm:
        what = _QUIET
    inside = package_of(last.stack) if last else None
    about = " ".join((what, *case.facts.subject.programs))
    if errors and not errors[-1][0].stack:
        about += " (no traceback)"
    if case.facts.lines <= _SHORT:
        about += " (short log)"
    changes = what_to_send(about)
    if inside:
        newer = _NEWER.get(inside, f"a newer release of {inside} first: the error is inside it")
        changes = (newer, *changes)
    return Diagnosis(
        kind=kind,
        phase="unknown",
        what=what,
        possible=possible,
        why=raised_in(last) if last else (),
        also=also,
        evidence=lines,
        unknown=("what caused it",) if last else ("what happened",),
        changes=changes,
        read=_read(case),
    )


#: Not NCCL's, whose errors have that level.
_WARNING: Final = re.compile(r"(?!.*NCCL WARN).{0,60}?\bWARN(?:ING)?\b|.{0,240}?[a-z]Warning: ")
#: Why a program's own check fails.
_CHECKED: Final = (
    "what it was given or found here (an option, the model, a file, the card, a version) is not"
    " what this release takes: its sentence says which",
    "a fault of this release",
)
#: What is newer than a checkpoint's own code, which has no releases.
_NEWER: Final = {
    "transformers_modules": "the checkpoint's newest revision first: the error is in its own code"
}
#: A log of whose lines none is of an error; what its program did is not known.
_QUIET: Final = "no line of this log tells of an error"
#: Lines up to which a log does not tell which program it is of.
_SHORT: Final = 3
#: Of a message that does not tell its cause.
_UNDECIDED: Final = "which of these it was: the message does not tell it"


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
