"""Answers a report whose log decides nothing, by its title, then by its sentences.

No line of the log reports an error, or the log ends before it. The steps are: look a person's
sentence up in the rows for log lines; report it as a person's statement, with the causes of others
who met the same; say where the text ends.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.process.hidden import without_keys
from turbofit.diagnose.rules.causes import general, less_memory
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, raised_in
from turbofit.diagnose.rules.figures import explanation_of
from turbofit.diagnose.rules.rules_torch import phase_of, program_of
from turbofit.diagnose.told import TITLE, TROUBLE, message_in, plain, said

if TYPE_CHECKING:
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.facts import LogFacts
    from turbofit.observe.stages import Phase

_NO_LINE: Final = "no line of this log tells what failed"
_NO_LOG: Final = "this text has no log"
_IN_LOG: Final = "its log and before a line that tells what failed"
#: Kinds of a server that waits for something.
STILL: Final = ("stands_still", "said_to_hang")
#: The kind of an error that no row knows.
_NO_ROW: Final = "unknown"
#: The name of an exception before its message.
_NAME: Final = re.compile(r"(?:\w+\.)*(\w+): ")
#: Words by which people name the phase in which memory ran out.
_PHASES: Final[dict[Phase, re.Pattern[str]]] = {
    "weights": re.compile(r"(?i:\b(?:re)?load|start|\binit|加载|启动|部署)"),
    "serving": re.compile(r"(?i:infer|image|request|prompt|图片|圖片|推理|请求|长)"),
}
#: Kinds of rows about serving, for logs in which LMDeploy quantised.
_OF_SERVING: Final = (
    "wrong_quantization", "unsupported_feature", "unsupported_model", "asks_support",
)  # fmt: skip
#: The most deciding sentences that are quoted, and the most sentences of any kind.
_DECIDING: Final = 2
_SENTENCES: Final = 5
#: The characters of one quotation, and those by which it is found again in an earlier one.
_SHOWN: Final = 320
_SAME: Final = 40
#: A source line with fewer characters is torn.
_TORN: Final = 6


def told_by(case: LogCase, least: int = TITLE) -> RuleAnswer | None:
    """The answer by the sentence that tells most, the title first; it must tell ``least``."""
    marks = sorted(case.facts.told.marks, key=_tells_most)
    answers = (_stated(case, mark) for order, mark in marks if order <= least)
    return next(answers, None)


def _tells_most(told: tuple[int, LogEvent]) -> tuple[int, bool]:
    """The order of sentences: of known ones, a lack of memory goes first, since it ends a run."""
    order, mark = told
    return order, mark.row is None or mark.row.kind != "out_of_memory"


def _stated(case: LogCase, mark: LogEvent) -> RuleAnswer:
    facts, cut = case.facts, case.facts.cut_at
    draft = explanation_of(mark, case) or RuleAnswer(kind="check_failed", line=mark.line)
    changes = draft.changes
    if draft.kind == "out_of_memory":
        changes = _less_memory(mark.text, case)
    nothing = _NO_LINE if facts.told.logs else _NO_LOG
    draft = replace(
        draft,
        phase="unknown",
        what=f"{ends(facts, draft.kind) or nothing}; {said(evidence(mark, '').text)}",
        why=(last_call(cut), *raised_in(cut)) if cut and cut.stack else (),
        possible=draft.possible or tuple(filter(None, (draft.what,))),
        changes=changes,
        evidence=(evidence(mark._replace(text=plain(mark.text)), "what the report tells"),)
        + ((evidence(cut, "the last call that it shows"),) if cut and cut.stack else ()),
    )
    return with_general(case, draft, message_in(mark.text))


def ends(facts: LogFacts, kind: str = "") -> str:
    """The place where a text was cut before its error; empty if it was not cut.

    The log of a server that is said to hang has no more lines: it was not cut.
    """
    where = "a traceback and before the error itself"
    if facts.cut_at is None:
        where = _IN_LOG if facts.told.ends_in_log and kind not in STILL else ""
    return where and f"this text ends at line {facts.lines}, within {where}"


def last_call(cut: LogEvent) -> str:
    """The last call of a torn traceback; if its line is torn itself, only its function."""
    text = evidence(cut, "").text
    if len(text) < _TORN and cut.stack:
        text = cut.stack[-1].function
    return f"its last call is: {text}" if cut.stack else ""


def _less_memory(text: str, case: LogCase) -> tuple[str, ...]:
    """Ways to take less memory in the phase that a traceback or the words show."""
    cut = case.facts.cut_at
    stack = cut.stack if cut else ()
    phase = phase_of(stack)
    if phase == "unknown":
        told = (name for name, words in _PHASES.items() if words.search(text))
        phase = next(told, "unknown")
    program = program_of(stack, case.facts.subject)
    return less_memory("lmdeploy" if program == "other" else program, phase)


def with_general(case: LogCase, draft: RuleAnswer, message: str) -> RuleAnswer:
    """Add the general causes of such an exception to an answer for which no row lists any.

    If LMDeploy quantises, its own list replaces the causes of serving.
    """
    if draft.possible and draft.kind not in _OF_SERVING:
        return draft
    lite = case.facts.subject.quantises and not _serves(case)
    name = _NAME.match(message)
    key = "lite" if lite else "" if draft.possible or name is None else name[1]
    listed = general(key) if case.facts.subject.of_inference else None
    if listed is None:
        return draft
    return replace(draft, kind=_NO_ROW, possible=listed.possible, changes=listed.change)


def _serves(case: LogCase) -> bool:
    """Whether the torn traceback in a log with `lmdeploy lite` is of another part of LMDeploy."""
    stack = case.facts.cut_at.stack if case.facts.cut_at else ()
    of_lmdeploy = [frame.path for frame in stack if "lmdeploy" in frame.path]
    return bool(of_lmdeploy) and not any("lite" in path for path in of_lmdeploy)


def also_told(case: LogCase, what: str, *, alone: bool) -> tuple[str, ...]:
    """The report's title and its deciding sentences, to be shown with the quoted line.

    If they are ``alone``, because no line of a program tells of an error, further sentences are
    added, those about trouble first.
    """
    told = case.facts.told
    marks = [told.title] if told.title and plain(told.title.text) else []
    marks += [*told.solves[:_DECIDING], *told.decides[:_DECIDING]]
    if told.title and alone:
        troubles = [mark for order, mark in told.marks if order <= TROUBLE]
        marks += [*troubles, *told.sentences]
    shown, texts = what, []
    for mark in marks:
        if plain(mark.text)[:_SAME] not in shown:
            texts.append(without_keys(said(mark.text))[:_SHOWN])
            shown += mark.text
    return tuple(texts[:_SENTENCES])


def solution_of(case: LogCase) -> str:
    """The first sentence in which a report itself says what mended it; empty if none does."""
    texts = [mark.text for mark in case.facts.told.solves[:1]]
    return "".join(f"what the text itself says: {without_keys(text)[:_SHOWN]}" for text in texts)
