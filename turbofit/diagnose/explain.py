"""Turns a log into its answer: the earliest cause, advice, and the remaining questions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.process.hidden import without_keys
from turbofit.core.version import REFERENCE
from turbofit.diagnose.advice import advice
from turbofit.diagnose.answer import Diagnosis, Others, Read
from turbofit.diagnose.ask import first_step, to_send
from turbofit.diagnose.case import LogCase
from turbofit.diagnose.event import CLEANS_UP
from turbofit.diagnose.facts import read_runs
from turbofit.diagnose.mood import tells_of_error
from turbofit.diagnose.rows import rows
from turbofit.diagnose.rules import rules_told
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, raised_in
from turbofit.diagnose.rules.rules_hang import hang_rules
from turbofit.diagnose.rules.rules_host import host_rules, peer_meaning, quiet_rules
from turbofit.diagnose.rules.rules_torch import missing_of, torch_rules
from turbofit.diagnose.rules.rules_turbomind import turbomind_rules
from turbofit.diagnose.told import KNOWN, TITLE, TROUBLE, message_in, said
from turbofit.observe.log_events import (
    CacheBudget,
    CudaError,
    KnownMessage,
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    PythonError,
    Slab,
    TorchMemory,
)
from turbofit.observe.log_reader import read_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.diagnose.answer import Advice
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.facts import LogFacts

_RULES: Final = (
    turbomind_rules,
    torch_rules,
    hang_rules,
    host_rules,
    quiet_rules,
)
#: Kinds that a parent reports of an ended child: the child's own error goes before them.
_PARENTS: Final = ("aborted", "crashed", "engine_gone", "killed", "request_failed")
#: Notices that give the reason of an end, by the kind of end; they go before it.
_REASONS: Final = {
    "request_failed": ("request_rejected", "bad_image", "wrong_model_name"),
    "aborted": ("interrupted",),
    "engine_gone": ("interrupted",),
}
#: Notices that say what ended something: people's statements on it go before all others.
_DECIDES: Final = ("interrupted", *_REASONS["request_failed"])
#: Kinds that describe a symptom and no cause.
_NO_CAUSES: Final = ("stands_still", "foreign")
_RANKS: Final = {"cause": 0, "refusal": 1, "consequence": 2, "notice": 3}


def diagnose(
    chunks: Iterable[bytes], *, model: str | None = None, on: str | None = None
) -> Diagnosis:
    """Explain a log; returns the diagnosis.

    Args:
        chunks: the log's bytes, in pieces.
        model: the model, if the log does not name it or names it wrongly.
        on: the machine, if the log does not describe it or describes it wrongly.

    Raises:
        UsageError: ``model`` or ``on`` has no possible meaning.
    """
    runs = read_runs(rows(chunks))
    cases = [LogCase(facts, model=model, on=on) for facts in runs]
    foreign = cases[-1].facts.subject.foreign
    if foreign.engine:
        return _unknown(cases[-1], _foreign_answer(cases[-1], foreign.engine), ())
    drafts = _drafts(cases)
    if not drafts:
        return _unknown(cases[-1], _told(cases[-1]) or _last_error(cases[-1]), ())
    best, of_run = drafts[0]
    notice = best.rank == "notice" and best.kind not in _DECIDES
    told = _told(of_run, TROUBLE) if notice else None
    if told and told.line == best.line:
        told = None
    if told or _tells_less(best, of_run):
        less = told or _told(of_run) or _last_error(of_run)
        return _unknown(of_run, less, (_in_short(best),))
    answer = _answer if best.what and best.kind not in _NO_CAUSES else _unknown
    return answer(of_run, best, _others(best, drafts[1:]))


def _others(best: RuleAnswer, drafts: Sequence[tuple[RuleAnswer, LogCase]]) -> tuple[str, ...]:
    """The other causes in short, each kind once, in the words of its first answer."""
    also = {
        draft.kind: _in_short(draft)
        for draft, _ in reversed(drafts)
        if draft.kind != best.kind and draft.rank != "notice"
    }
    return tuple(reversed(also.values()))


def _drafts(cases: list[LogCase]) -> list[tuple[RuleAnswer, LogCase]]:
    """All answers, the best first: the earliest cause, and the reason of an end before it."""
    drafts = sorted(
        ((draft, case) for case in cases for rule in _RULES for draft in rule(case)),
        key=lambda pair: _order(pair[0]),
    )
    reasons = _REASONS.get(drafts[0][0].kind, ()) if drafts else ()
    return sorted(drafts, key=lambda pair: pair[0].kind not in reasons)


def _order(draft: RuleAnswer) -> tuple[int, bool, int]:
    """Causes first; of notices, those that decide what ended something; then the earliest."""
    decides = draft.rank != "notice" or draft.kind in _DECIDES
    return _RANKS[draft.rank], not decides, draft.line


def _told(case: LogCase, least: int = TITLE) -> RuleAnswer | None:
    """An answer from people's sentences, if no line of a program decides; a warning does not."""
    facts = case.facts
    if _raised(case) or facts.mood.logged or facts.subject.foreign.tool:
        return None
    known = any(
        mark.row and mark.row.rank != "notice" and not facts.told.has(mark.line)
        for mark, _ in facts.every(KnownMessage)
    )
    weak = known or facts.mood.last_complaint or facts.cut_at
    return rules_told.told_by(case, min(least, KNOWN) if weak else least)


def _tells_less(best: RuleAnswer, case: LogCase) -> bool:
    """Whether an unknown exception, or the beginning of one, tells more than the best answer."""
    last, facts = case.event.last, case.facts
    told_less = best.rank in ("refusal", "notice") and best.kind != "interrupted"
    if last is None and best.kind in ("request_failed", "engine_gone"):
        return facts.mood.logged is not None
    if last is None:
        explains = best.kind in _REASONS["request_failed"]
        return best.rank == "notice" and not explains and facts.cut_at is not None
    return best.kind in (*_PARENTS, "peer_warning") or (told_less and last.line > best.line)


def _in_short(draft: RuleAnswer) -> str:
    return f"line {draft.line}: {draft.what or draft.quoted}"


def _answer(case: LogCase, draft: RuleAnswer, also: tuple[str, ...]) -> Diagnosis:
    would_work, lacks = _plan(case, draft)
    peers = case.facts.first(PeerMissing)
    why, lines, changes = draft.why, draft.evidence, _changes(case, draft, would_work)
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
        changes=changes,
        would_work=would_work,
        send=draft.send,
        first=next(iter((*draft.send, *changes)), ""),
        unknown=tuple(dict.fromkeys((*draft.unknown, *lacks, *_assumed(case)))),
        also=also,
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        read=_read(case),
    )


def _changes(case: LogCase, draft: RuleAnswer, planned: Advice | None) -> tuple[str, ...]:
    """The changes to try; for a model in few bits, no variant in fewer bits.

    If the plan fits, the cards suffice: no change asks for more, and help for a load comes last.
    """
    changes = draft.changes
    if case.model is not None and case.model.quantization is not None:
        changes = tuple(
            change.replace("a quantised variant", "a smaller model") for change in changes
        )
    if planned is None or not planned.fits:
        return changes
    enough = (change.replace(", or more cards", "") for change in changes)
    return tuple(sorted(enough, key=lambda change: change.startswith("if it was loading")))


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


def _assumed(case: LogCase) -> tuple[str, ...]:
    return (f"which of its sizes the card has: {case.assumed}",) if case.assumed else ()


def _unknown(case: LogCase, draft: RuleAnswer, also: tuple[str, ...]) -> Diagnosis:
    """A diagnosis without a proven cause: a message that a rule knows, or the last error."""
    if draft.kind != "foreign":
        quoted = message_in(draft.quoted) if draft.evidence else ""
        draft = rules_told.with_general(case, draft, quoted)
    what = draft.what or f"{_NO_CAUSE}: {_in_a_line(draft)}"
    by_person, cut = case.facts.told.has(draft.line), case.facts.cut_at is not None
    if by_person and not draft.what:
        what = f"{_NO_CAUSE}; {said(_in_a_line(draft))}"
    others = Others(message=draft.kind, had=draft.possible, tried=draft.changes)
    would_work, lacks = _plan(case, draft)
    memory = case.facts.first_event(TorchMemory)
    send = () if draft.kind == "foreign" else to_send(case, draft, what)
    return Diagnosis(
        kind="unknown",
        phase="unknown",
        what=what,
        others=others if draft.possible else None,
        why=(*draft.why, *rules_told.also_told(case, what, alone=by_person or cut)),
        missing=missing_of(memory) if memory and draft.kind == "foreign" else None,
        also=also,
        evidence=draft.evidence,
        would_work=would_work,
        unknown=("what caused it" if draft.evidence else "what happened", *lacks, *_assumed(case)),
        send=send,
        first=first_step(case, draft, send),
        read=_read(case),
    )


def _in_a_line(draft: RuleAnswer) -> str:
    """The line, or the row's quotation from a line that is longer than a message."""
    line = draft.quoted
    if len(line) < _LONG_LINE:
        return line
    start = f"{line[: _LONG_LINE // 2]}…"
    told = not draft.said or draft.said[:_SHOWN_OF_IT] in start or len(draft.said) > _LONG_LINE
    return start if told else f"{start} {draft.said}"


def _last_error(case: LogCase) -> RuleAnswer:
    """An answer that quotes the last exception, else a line."""
    if tool := case.facts.subject.foreign.tool:
        return _foreign_answer(case, tool)
    if errors := _raised(case):
        return _last_exception(case, errors)
    if case.facts.cut_at is not None:
        return _cut_off(case, case.facts.cut_at)
    if case.facts.clean_up is not None:
        return _of_clean_up(case.facts.clean_up)
    return _last_line(case)


def _raised(case: LogCase) -> list[tuple[LogEvent, PythonError]]:
    """The exceptions that no row matches; else those whose row's condition is not met."""
    return case.facts.every(PythonError) or [
        (mark, error)
        for mark, _ in case.facts.every(KnownMessage)
        if isinstance(error := read_line(mark.text), PythonError)
    ]


def _last_exception(case: LogCase, errors: list[tuple[LogEvent, PythonError]]) -> RuleAnswer:
    last, error = errors[-1]
    text = without_keys(error.message or (last.stack[-1].code if last.stack else ""))
    what = f"turbofit does not know this error: {error.name}: {text}"
    return rules_told.with_general(case, _quote(last, what.rstrip(": ")), f"{error.name}: ")


def _cut_off(case: LogCase, mark: LogEvent) -> RuleAnswer:
    """An answer for a traceback without its end: its last call, or an error that was logged."""
    end, logged = rules_told.ends(case.facts), case.facts.mood.logged
    if logged is not None:
        text = _with_end(logged.text.strip())
        return _quote(logged, f"{end}; the last error that was logged: {text}")
    what = "; ".join(filter(None, (end, rules_told.last_call(mark))))
    return _quote(mark, what, "the last call that it shows")


def _foreign_answer(case: LogCase, name: str) -> RuleAnswer:
    """One line on a log of another program: its version and its last error, without a cause."""
    version = case.facts.subject.foreign.version(name)
    program = f"{name} {version}" if version else name
    last = _last_of_foreign(case)
    if last is None:
        what = (
            f"a log of {program}, which turbofit does not explain: no line of it tells of an error"
        )
        return RuleAnswer(kind="foreign", line=0, what=what)
    row = evidence(last, "the last error")
    text = _with_end(last.text.strip())
    return RuleAnswer(
        kind="foreign",
        line=last.line,
        what=f"a log of {program}, which turbofit does not explain; its last error: {text}",
        evidence=(row,),
        planned=name == case.facts.subject.foreign.engine,
    )


def _with_end(text: str) -> str:
    """A line to quote; if it is too long, also its end, provided that the end tells of an error."""
    text = without_keys(text)
    if len(text) <= _SHOWN or not tells_of_error(text[-_SHOWN // 2 :]):
        return text[:_SHOWN]
    return f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"


def _last_of_foreign(case: LogCase) -> LogEvent | None:
    """The line to quote: one with sizes of memory, else the last exception, else any line."""
    facts, event = case.facts, case.event
    short = [mark for mark, _ in facts.every(TorchMemory)]
    raised = [mark for mark in event.marks if isinstance(mark.event, PythonError)]
    below = [mark for mark in event.marks if not mark.of_title]
    lines = [*below[-1:], *raised[-1:]] if event.outcome == "fatal" else []
    known = short or sorted(lines, key=lambda mark: mark.line)[-1:]
    texts = (mark for _, mark in facts.told.marks if not mark.of_title)
    told = [mark for mark in texts if tells_of_error(mark.text)]
    more = [facts.mood.last_complaint, facts.mood.last_refusal, *reversed(told)]
    return known[-1] if known else next((mark for mark in more if mark is not None), None)


def _of_clean_up(mark: LogEvent) -> RuleAnswer:
    """An answer for an error of a program that was ending: the reason for its end came before."""
    where = next(frame.function for frame in reversed(mark.stack) if frame.function in CLEANS_UP)
    text = evidence(mark, "").text
    draft = _quote(mark, f"{_NO_CAUSE}: it had ended before this error of its clean-up: {text}")
    why = (
        f"it was raised in {where}, with which a program takes itself down: the first error, of the"
        " worker processes too, is the cause",
    )
    return replace(draft, why=why)


def _last_line(case: LogCase) -> RuleAnswer:
    mood, messages = case.facts.mood, case.facts.every(KnownMessage)
    known = messages[-1][0] if messages else None
    line = mood.logged or mood.last_complaint or known or mood.last_refusal
    if line is None:
        planned = case.model is not None and case.machine is not None
        what = _QUIET + (_PICTURES if mood.pictures else "")
        return RuleAnswer(kind="", line=0, what=what, planned=planned)
    text = _with_end(line.text.strip())
    if _WARNING.match(text):
        return _quote(line, f"this log has a warning, and no error: {text}", "the last warning")
    return _quote(line, f"turbofit does not know this message: {text}")


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
#: The beginning of an answer about a message that does not tell its cause.
_NO_CAUSE: Final = "turbofit does not know the cause from this log"
#: The answer for a log without any line that is known to report an error.
_QUIET: Final = "turbofit recognises no error in this log"
_PICTURES: Final = "; where its error stands in a picture, its text is needed"
#: A longer line is cut when it is first quoted; its evidence has more of it.
_LONG_LINE: Final = 200
#: The number of characters by which a row's quotation is found in the beginning of its line.
_SHOWN_OF_IT: Final = 20
#: Characters of a quoted line.
_SHOWN: Final = 240


def _read(case: LogCase) -> Read:
    facts, subject = case.facts, case.facts.subject
    named = case.model.name if case.model else None
    return Read(
        lines=facts.lines,
        engine=_engine(facts),
        version=subject.foreign.version(subject.foreign.engine)
        or subject.version
        or _generation(facts),
        model=named,
        machine=case.on,
        tp=case.tp,
        settings=dict(subject.options),
    )


def _engine(facts: LogFacts) -> str | None:
    turbomind = (CacheBudget, Slab, KvBlocks, LegacyCuda, CudaError, PeerMissing)
    if any(isinstance(m.event, turbomind) for m in facts.marks):
        return "turbomind"
    return facts.subject.foreign.engine.lower() or None


def _generation(facts: LogFacts) -> str | None:
    """LMDeploy's generation by the form of its lines, if no version is printed; else None."""
    if facts.first(CacheBudget) or facts.first(Slab):
        return f"0.15 to {REFERENCE}"
    if facts.first(PeerMissing):
        return "0.2 to 0.7"
    if facts.first(LegacyCuda):
        return "0.2 to 0.13"
    return "0.2 to 0.14" if facts.first(KvBlocks) else None
