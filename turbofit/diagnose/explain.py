"""Turns a log into its one answer: what happened, why, the first step, and a run that would work."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.version import REFERENCE
from turbofit.diagnose.account import cures, smaller
from turbofit.diagnose.answer import Advice, Diagnosis, Others, Read
from turbofit.diagnose.case import LogCase
from turbofit.diagnose.causes import what_to_send
from turbofit.diagnose.draft import Draft, evidence
from turbofit.diagnose.facts import read_runs
from turbofit.diagnose.rows import rows
from turbofit.diagnose.rules import PEERS, drafts_of
from turbofit.memory.versions import is_legacy, release
from turbofit.observe import log_events as events
from turbofit.observe.death import IN_DIAGNOSIS
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.plan import Plan, Remedy

#: Notices that give the reason of an end, by the kind of end; they go before it.
_REASONS: Final = {
    "request_failed": ("request_rejected", "bad_image", "wrong_model_name"),
    "aborted": ("interrupted",),
    "engine_gone": ("interrupted",),
    "unknown": ("interrupted",),
}
_RANKS: Final = {"cause": 0, "refusal": 1, "consequence": 2, "notice": 3}
_SHOWN: Final = ("tp", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
                 "session_len", "dtype", "quant_policy")  # fmt: skip
_LIMITS: Final = ("max_dynamic_patch", "max_pixels_per_image")
_SHARE: Final = re.compile(r"cache[-_]max[-_]entry[-_]count")
_NO_CAUSE: Final = "turbofit does not know the cause from this log"
_QUIET: Final = "turbofit recognises no error in this log"
_LOADED_HERE: Final = (
    "this log ran out of memory while it loaded there: where nothing else was on the cards, the"
    " account is too low, and a quantised variant or more GPUs are what helps"
)


def diagnose(
    chunks: Iterable[bytes], *, model: str | None = None, on: str | None = None, hang: bool = False
) -> Diagnosis:
    """Explain a log; returns the diagnosis.

    Args:
        chunks: the log's bytes, in pieces.
        model: the model, if the log does not name it or names it wrongly.
        on: the machine, if the log does not describe it or describes it wrongly.
        hang: whether the program stands still, which no line says.

    Raises:
        UsageError: ``model`` or ``on`` has no possible meaning.
    """
    runs = read_runs(rows(chunks))
    cases = [LogCase(facts, model=model, on=on, hangs=hang) for facts in runs]
    drafts = [(draft, case) for case in cases for draft in drafts_of(case)]
    drafts.sort(key=lambda pair: _order(pair[0]))
    reasons = _REASONS.get(drafts[0][0].kind, ()) if drafts else ()
    drafts.sort(key=lambda pair: pair[0].kind not in reasons)
    last = cases[-1]
    if last.subject.foreign:
        return _foreign(last, [draft for draft, _ in drafts])
    if not drafts:
        return _quiet(last)
    best, case = drafts[0]
    also = {
        f"line {draft.line}: {draft.what or draft.quoted}": draft.kind
        for draft, _ in drafts[1:]
        if draft.kind != best.kind and draft.rank != "notice" and draft.line != best.line
    }
    short = tuple({kind: text for text, kind in reversed(also.items())}.values())[::-1]
    return _answer(case, best, short)


def _order(draft: Draft) -> tuple[int, int]:
    """Causes first, the earliest; of exceptions that no row knows the last: Python prints it so."""
    rank = _RANKS[draft.rank]
    return rank, -draft.line if rank == 1 else draft.line


def _answer(case: LogCase, draft: Draft, also: tuple[str, ...]) -> Diagnosis:
    known = bool(draft.what) and draft.kind != IN_DIAGNOSIS["stalled"]
    ways = cures(case, draft.phase, draft.by_others) if draft.short else ()
    would_work, lacks = _worked(case, draft, ways)
    changes = _steps(case, draft, ways, would_work)
    send = draft.send
    what = draft.what
    if not known:
        what = what or f"{_NO_CAUSE}: {draft.quoted}"
        send = (*_newer(case), *what_to_send(_about(case, draft), _marks(case, draft)))
    others = Others(message=draft.kind, had=draft.possible, tried=changes) if not known else None
    first = next(iter((*draft.send, *changes) if known else (*changes, *send)), "")
    why, lines = draft.why, draft.evidence
    peers = case.facts.first(events.PeerMissing)
    if peers and known and draft.kind != "peer_warning":
        why = (*why, f"the peer access warning is not the cause: {PEERS}")
        lines = (*lines, evidence(peers, "GPUs without peer access"))
    unknown = draft.unknown if known else ("what caused it",)
    return Diagnosis(
        kind=draft.kind if known else "unknown",
        phase=draft.phase if known else "unknown",
        what=what,
        why=why,
        others=others if draft.possible and not known else None,
        held=draft.held,
        missing=draft.missing,
        missing_in_all=draft.missing_in_all,
        changes=changes if known else (),
        would_work=would_work,
        send=send,
        first=first,
        unknown=tuple(dict.fromkeys((*unknown, *lacks, *_assumed(case)))),
        also=also,
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        read=_read(case),
    )


def _steps(
    case: LogCase, draft: Draft, ways: Sequence[tuple[Remedy, Plan]], worked: Advice | None
) -> tuple[str, ...]:
    """The steps, the first one first, none of which goes against the plan or the log beside it.

    What the account lets live goes before what helps in general. A step that the log has done is
    left out; so is a share of the cache where no share helps, and more cards where the cards do.
    """
    steps = [step for step in draft.changes if not _is_done(case, step)]
    of_others = [step for step in steps if "holds the card" in step]
    general = [step for step in steps if step not in of_others]
    own = [remedy.change for remedy, _ in ways]
    if draft.short and worked is not None and worked.fits is False:
        own = [remedy.change for remedy in worked.remedies]
        general = [step for step in general if not _SHARE.search(step)]
    elif draft.short and worked is not None and worked.fits and not own:
        own = [_as_settings(worked)] if case.subject.of_lmdeploy else []
    if draft.short and case.subject.of_lmdeploy and own:
        general = []
    if worked is not None and worked.fits:
        general = [step.replace(", or more cards", "") for step in general]
    if case.model is not None and case.model.quantization is not None:
        general = [step.replace("a quantised variant", "a smaller model") for step in general]
    return tuple(dict.fromkeys((*of_others, *own, *general)))


def _as_settings(advice: Advice) -> str:
    names = ("tp", "cache_max_entry_count", "max_batch_size", "session_len")
    words = (f"--{name.replace('_', '-')} {advice.settings[name]}" for name in names)
    return f"these settings together: {' '.join(words)}"


def _is_done(case: LogCase, step: str) -> bool:
    """Whether the log's own command or variables have a step already."""
    asked = re.findall(r"\b([A-Z][A-Z0-9_]+)=(\S+?)[:;,]?(?=\s|$)", step)
    return any(case.subject.variables.get(name) == value for name, value in asked)


def _worked(
    case: LogCase, draft: Draft, ways: Sequence[tuple[Remedy, Plan]]
) -> tuple[Advice | None, tuple[str, ...]]:
    """A run that would have worked and contains the first step, and what is needed to find one."""
    if not draft.planned:
        return None, ()
    lacks = []
    if case.model is None:
        name = case.subject.model
        lacks.append(
            f"what {name} is: it has no preset here, so name its folder or a preset with --model"
            if name
            else "which model it was: name it with --model"
        )
    if case.machine is None:
        lacks.append(f"which machine it was: {case.no_machine or 'name it with --on'}")
    if lacks or case.model is None or case.machine is None or case.on is None:
        return None, tuple(lacks)
    if case.subject.quantises:
        ways_out, name = smaller(case), case.model.name
        verdict = "a checkpoint that is quantised already needs no calibration"
        advice = Advice(model=name, on=case.on, fits=None, verdict=verdict, remedies=ways_out)
        return (advice if ways_out else None), ()
    if ways:
        return _of_plan(case, ways[0][1], case.on, tuple(remedy for remedy, _ in ways)), ()
    return _planned(case, draft), ()


def _planned(case: LogCase, draft: Draft) -> Advice | None:
    """The best plan for the log's release on its cards, beside what others hold of them."""
    model, machine, spec = case.model, case.machine, case.on or ""
    if model is None or machine is None:
        return None
    version = case.subject.version or (case.version if case.subject.of_lmdeploy else None)
    old = version if version and case.subject.of_lmdeploy and is_legacy(version) else None
    tp = case.tp if case.subject.ranks and draft.short is False and case.tp > 1 else None
    if draft.by_others:
        machine = machine.with_used(draft.by_others)
        spec = case.named(machine)
    try:
        request = PlanRequest.of(model=model, on=machine, lmdeploy=old, tp=tp)
        plan = best_plan(request, compares_limits=False)
        if not plan.fits and draft.by_others:
            alone = best_plan(request.changed(on=case.machine), compares_limits=False)
            if alone.fits:
                free = _of_plan(case, alone, case.on or "", alone.remedies)
                return replace(free, verdict=f"once the cards are free: {alone.verdict}")
    except TurbofitError as exc:
        verdict = f"{exc.message} ({exc.hint})"
        return Advice(model=model.name, on=spec, fits=None, verdict=verdict)
    advice = _of_plan(case, plan, spec, plan.remedies or smaller(case))
    loading = draft.short and draft.phase == "weights" and case.subject.of_lmdeploy
    if plan.fits and loading and not draft.by_others and plan.parallel.tp <= case.tp:
        verdict = f"by turbofit's account it {plan.verdict}"
        return replace(advice, fits=None, verdict=verdict, note=_LOADED_HERE)
    return advice


def _of_plan(case: LogCase, plan: Plan, spec: str, remedies: tuple[object, ...]) -> Advice:
    shown = _SHOWN if plan.engine.on_torch else (*_SHOWN, "communicator")
    values: dict[str, object] = {"engine": plan.engine.name}
    for name in shown:
        of_groups = [getattr(group.settings, name) for group in plan.group_plans()]
        same = len(set(of_groups)) == 1
        values[name] = of_groups[0] if same else " | ".join(map(str, of_groups))
    values["replicas"] = plan.parallel.replicas
    limits = {name: getattr(plan.limits, name) for name in _LIMITS}
    values |= {name: limit for name, limit in limits.items() if limit is not None}
    command = ""
    if plan.engine.of_lmdeploy and (is_legacy(plan.engine.version) or plan.serve is None):
        command = shlex.join(plan.commands[0].argv) if plan.fits else ""
    elif plan.serve is not None:
        command = shlex.join(plan.serve.argv)
    notes = []
    if plan.engine.of_lmdeploy and case.subject.of_lmdeploy:
        assumed = "" if case.subject.version else ", which the log does not name"
        notes.append(f"for LMDeploy {plan.engine.version}{assumed}")
    if case.unseen:
        notes.append(f"the machine has {case.unseen} more such cards, which the run did not see")
    return Advice(
        model=plan.model.name,
        on=spec,
        fits=plan.fits,
        verdict=plan.verdict,
        settings=values if plan.fits else {},
        command=command,
        note="; ".join(notes),
        remedies=remedies,  # type: ignore[arg-type]
    )


def _quiet(case: LogCase) -> Diagnosis:
    """The answer for a log without any line that is known to report an error."""
    cut, what, first = case.facts.cut, _QUIET, ""
    draft = Draft(kind="unknown", line=0)
    if cut:
        what = (
            f"this text ends at line {case.facts.lines}, within a traceback and before the error"
            f" itself; its last call is: {cut[-1].code or cut[-1].function}"
        )
    elif in_words := case.facts.in_words:
        what = "the text says that memory ran out, and no line of a program says where"
        draft = replace(draft, line=in_words.line, evidence=(evidence(in_words, "words"),))
    planned = case.model is not None and case.machine is not None
    would_work = _planned(case, draft) if planned else None
    send = what_to_send(what, _marks(case, draft))
    return Diagnosis(
        kind="unknown",
        phase="unknown",
        what=what,
        would_work=would_work,
        send=send,
        first=first or next(iter(send), ""),
        unknown=("what happened", *_assumed(case)),
        evidence=draft.evidence,
        read=_read(case),
    )


def _foreign(case: LogCase, drafts: Sequence[Draft]) -> Diagnosis:
    """One line on another engine's log: its last error and the missing bytes, without a cause."""
    memory = next((draft for draft in drafts if draft.short), None)
    last = memory or max(drafts, key=lambda draft: (-_RANKS[draft.rank], draft.line), default=None)
    said = f"its last error: {last.quoted}" if last and last.quoted else "no line tells of an error"
    return Diagnosis(
        kind="unknown",
        phase="unknown",
        what=f"a log of {case.subject.foreign}, which turbofit does not explain; {said}",
        missing=memory.missing if memory else None,
        unknown=("what caused it",),
        evidence=last.evidence[:1] if last else (),
        read=_read(case),
    )


def _about(case: LogCase, draft: Draft) -> str:
    return f"{draft.quoted} {'lmdeploy' if case.subject.of_lmdeploy else ''}"


def _marks(case: LogCase, draft: Draft) -> list[str]:
    """What is known beside the error's line, for what to send."""
    facts = case.facts
    known = {
        "(nothing)": not draft.evidence and not facts.cut,
        "(cut)": bool(facts.cut),
        "(still)": draft.kind == "stands_still",
        "(error)": bool(draft.evidence) and draft.kind != "stands_still",
        "(no command)": not case.subject.options,
    }
    return [word for word, holds in known.items() if holds]


def _newer(case: LogCase) -> tuple[str, ...]:
    """A question about the newest known release, if the log names an older one."""
    version = case.subject.version
    if version is None or not (0, 0) < release(version) < release(REFERENCE):
        return ()
    return (
        f"whether a newer LMDeploy does the same: this text names {version}, and turbofit knows"
        f" {REFERENCE}",
    )


def _assumed(case: LogCase) -> tuple[str, ...]:
    return (f"which of its sizes the card has: {case.assumed}",) if case.assumed else ()


def _read(case: LogCase) -> Read:
    facts, subject = case.facts, case.subject
    turbomind = (events.CacheBudget, events.Slab, events.KvBlocks, events.LegacyCuda,
                 events.CudaError, events.PeerMissing)  # fmt: skip
    engine = subject.foreign.lower() or None
    if any(isinstance(mark.event, turbomind) for mark in facts.marks):
        engine = "turbomind"
    elif subject.on_pytorch and not engine:
        engine = "pytorch"
    told = case.tp if "tp" in subject.options or case.tp > 1 else None
    return Read(
        lines=facts.lines,
        engine=engine,
        version=subject.version or case.generation,
        model=case.model.name if case.model else None,
        machine=case.on,
        tp=told,
        settings=dict(subject.options),
    )
