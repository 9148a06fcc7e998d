"""Turns a log into its one answer: what happened, why, the first step, a run that would work."""

from __future__ import annotations

import re
import shlex
from functools import reduce
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.diagnose.account import cures, smaller
from turbofit.diagnose.answer import Advice, Diagnosis, Others, Read
from turbofit.diagnose.case import LogCase
from turbofit.diagnose.causes import what_to_send
from turbofit.diagnose.draft import Draft, evidence
from turbofit.diagnose.facts import read_runs
from turbofit.diagnose.rows import rows
from turbofit.diagnose.rules import PEERS, drafts_of, nothing_found
from turbofit.memory.versions import is_legacy
from turbofit.observe import log_events as events
from turbofit.observe.death import IN_DIAGNOSIS
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.machine import Machine
    from turbofit.core.model import Model
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
_VARIABLE: Final = re.compile(r"\b([A-Z][A-Z0-9_]+)=(\S+?)[:;,]?(?=\s|$)")
_SHARE: Final = re.compile(r"cache[-_]max[-_]entry[-_]count")
_NO_CAUSE: Final = "turbofit does not know the cause from this log"
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
    last = cases[-1]
    if last.subject.foreign:
        return _foreign(last, [draft for draft, _ in drafts])
    reasons = _REASONS.get(drafts[0][0].kind, ()) if drafts else ()
    drafts.sort(key=lambda pair: pair[0].kind not in reasons)
    best, case = drafts[0] if drafts else (nothing_found(last), last)
    also = {
        draft.kind: f"line {draft.line}: {draft.what or draft.quoted}"
        for draft, _ in reversed(drafts)
        if draft.kind != best.kind and draft.rank != "notice" and draft.line != best.line
    }
    return _answer(case, best, tuple(also.values())[::-1])


def _order(draft: Draft) -> tuple[int, int]:
    """Causes first, the earliest; of exceptions that no row knows the last: Python prints it so."""
    rank = _RANKS[draft.rank]
    return rank, -draft.line if rank == 1 else draft.line


def _answer(case: LogCase, draft: Draft, also: tuple[str, ...]) -> Diagnosis:
    known = bool(draft.what) and draft.kind not in ("unknown", IN_DIAGNOSIS["stalled"])
    ways = cures(case, draft.phase, draft.by_others) if draft.short else ()
    would_work, lacks = _worked(case, draft, ways)
    changes = _steps(case, draft, would_work, ways)
    send, what = draft.send, draft.what
    unknown = draft.unknown or (() if known else ("what caused it",))
    if not known:
        what = what or f"{_NO_CAUSE}: {draft.quoted}"
        about = f"{draft.quoted} {'lmdeploy' if case.subject.of_lmdeploy else ''}"
        send = (*send, *what_to_send(about, _marks(case, draft)))
    first = (*send, *changes) if known else (*changes, *send)
    why, lines, peers = draft.why, draft.evidence, case.facts.first(events.PeerMissing)
    if peers and known and draft.kind != "peer_warning":
        why = (*why, f"the peer access warning is not the cause: {PEERS}")
        lines = (*lines, evidence(peers, "GPUs without peer access"))
    assumed = (f"which of its sizes the card has: {case.assumed}",) if case.assumed else ()
    others = Others(message=draft.kind, had=draft.possible, tried=changes)
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
        first=next(iter(first), ""),
        unknown=tuple(dict.fromkeys((*unknown, *lacks, *assumed))),
        also=also,
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        read=_read(case),
    )


def _steps(
    case: LogCase, draft: Draft, worked: Advice | None, ways: Sequence[tuple[Remedy, Plan]]
) -> tuple[str, ...]:
    """The steps, the first one first, none of which goes against the plan or the log beside it.

    What the account lets live goes before what helps in general. A step that the log has done is
    left out; so is a share of the cache where no share helps, and more cards where the cards do.
    """
    share = any(_SHARE.search(remedy.change) for remedy, _ in ways)
    vain = draft.short and case.has_account and not share
    if worked is None:
        return tuple(dict.fromkeys(_general(case, draft, fits=False, vain=vain)))
    of_lmdeploy, fits = case.subject.of_lmdeploy, worked.fits
    vain |= fits is False
    steps = _general(case, draft, fits=bool(fits), vain=vain)
    own = [remedy.change for remedy in worked.remedies]
    if not draft.short or fits is None:
        return tuple(dict.fromkeys(steps or (own if vain and draft.changes else [])))
    if fits and not ways:
        own = [_as_settings(worked)] if of_lmdeploy else []
    ends = [step for step in steps if "holds the card" in step]
    return tuple(dict.fromkeys((*ends, *own, *([] if own and of_lmdeploy else steps))))


def _general(case: LogCase, draft: Draft, *, fits: bool, vain: bool) -> list[str]:
    """The steps that help in general, and are neither done, nor in vain, nor impossible."""
    words = {", or more cards": ""} if fits else {}
    if case.model is not None and case.model.quantization is not None:
        words["a quantised variant"] = "a smaller model"
    set_, steps = case.subject.variables, []
    for step in draft.changes:
        did = any(set_.get(name) == value for name, value in _VARIABLE.findall(step))
        if not did and not (vain and _SHARE.search(step)):
            steps.append(reduce(lambda text, pair: text.replace(*pair), words.items(), step))
    return steps


def _as_settings(advice: Advice) -> str:
    names = ("tp", "cache_max_entry_count", "max_batch_size", "session_len")
    words = (f"--{name.replace('_', '-')} {advice.settings[name]}" for name in names)
    return f"these settings together: {' '.join(words)}"


def _worked(
    case: LogCase, draft: Draft, ways: Sequence[tuple[Remedy, Plan]]
) -> tuple[Advice | None, tuple[str, ...]]:
    """A run that would have worked and contains the first step, and what is needed to find one."""
    model, machine, lacks = case.model, case.machine, []
    if not draft.planned:
        return None, ()
    if model is None:
        name = case.subject.model
        told = f"what {name} is: it has no preset here, so name its folder or a preset with"
        lacks.append(f"{told if name else 'which model it was: name it with'} --model")
    if machine is None or (case.guessed and not ways):
        lacks.append(f"which machine it was: {case.no_machine or 'name it with --on'}")
    if model is None or machine is None or lacks:
        return None, tuple(lacks)
    if ways:
        return _of_plan(case, ways[0][1], machine, tuple(remedy for remedy, _ in ways)), ()
    if case.subject.quantises:
        verdict = "a checkpoint that is quantised already needs no calibration"
        advice = Advice(model=model.name, on=case.on or "", fits=None, verdict=verdict)
        return replace(advice, remedies=smaller(case)), ()
    return _planned(case, draft, model, machine), ()


def _planned(case: LogCase, draft: Draft, model: Model, machine: Machine) -> Advice:
    """The best plan for the log's release on its cards, beside what others hold of them."""
    of_lmdeploy, kept = case.subject.of_lmdeploy, machine.with_used(draft.by_others)
    version = case.version if of_lmdeploy else None
    again = case.subject.ranks and not draft.short and case.tp > 1
    try:
        request = PlanRequest.of(
            model=model, on=kept, tp=case.tp if again else None,
            lmdeploy=version if version and is_legacy(version) else None,
        )  # fmt: skip
        plan = best_plan(request, compares_limits=False)
        if not plan.fits and draft.by_others:
            alone = best_plan(request.changed(on=machine), compares_limits=False)
            if alone.fits:
                free = _of_plan(case, alone, machine, alone.remedies)
                return replace(free, verdict=f"once the cards are free: {alone.verdict}")
    except TurbofitError as exc:
        verdict = f"{exc.message} ({exc.hint})"
        return Advice(model=model.name, on=case.named(kept), fits=None, verdict=verdict)
    advice = _of_plan(case, plan, kept, plan.remedies or smaller(case))
    loading = draft.short and draft.phase == "weights" and of_lmdeploy and not draft.by_others
    if plan.fits and loading and plan.parallel.tp <= case.tp:
        verdict = f"by turbofit's account it {plan.verdict}"
        return replace(advice, fits=None, verdict=verdict, note=_LOADED_HERE)
    return advice


def _of_plan(case: LogCase, plan: Plan, machine: Machine, remedies: tuple[Remedy, ...]) -> Advice:
    values: dict[str, object] = {"engine": plan.engine.name}
    for name in _SHOWN if plan.engine.on_torch else (*_SHOWN, "communicator"):
        of_groups = {str(getattr(group.settings, name)) for group in plan.group_plans()}
        one = getattr(plan.group_plans()[0].settings, name)
        values[name] = one if len(of_groups) == 1 else " | ".join(sorted(of_groups))
    values["replicas"] = plan.parallel.replicas
    limits = {name: getattr(plan.limits, name) for name in _LIMITS}
    values |= {name: limit for name, limit in limits.items() if limit is not None}
    command = shlex.join(plan.serve.argv) if plan.serve else ""
    if plan.engine.of_lmdeploy and (is_legacy(plan.engine.version) or plan.serve is None):
        command = shlex.join(plan.commands[0].argv) if plan.fits else ""
    notes = []
    if plan.engine.of_lmdeploy and case.subject.of_lmdeploy:
        assumed = "" if case.subject.version else ", which the log does not name"
        notes.append(f"for LMDeploy {plan.engine.version}{assumed}")
    if case.unseen:
        notes.append(f"the machine has {case.unseen} more such cards, which the run did not see")
    return Advice(
        model=plan.model.name,
        on=case.named(machine),
        fits=plan.fits,
        verdict=plan.verdict,
        settings=values if plan.fits else {},
        command=command,
        note="; ".join(notes),
        remedies=remedies,
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


def _marks(case: LogCase, draft: Draft) -> list[str]:
    """What is known beside the error's line, for what to send."""
    still, cut = draft.kind == IN_DIAGNOSIS["stalled"], bool(case.facts.cut)
    marks = {
        "(nothing)": not draft.evidence and not cut, "(cut)": cut, "(still)": still,
        "(error)": bool(draft.evidence) and not still, "(no command)": case.facts.begun_at is None,
    }  # fmt: skip
    return [word for word, holds in marks.items() if holds]


def _read(case: LogCase) -> Read:
    facts, subject = case.facts, case.subject
    turbomind = (events.CacheBudget, events.Slab, events.KvBlocks, events.LegacyCuda,
                 events.CudaError, events.PeerMissing)  # fmt: skip
    engine = subject.foreign.lower() or ("pytorch" if subject.on_pytorch else None)
    if any(isinstance(mark.event, turbomind) for mark in facts.marks):
        engine = "turbomind"
    return Read(
        lines=facts.lines,
        engine=engine,
        version=subject.version,
        model=case.model.name if case.model else None,
        machine=case.on,
        tp=case.tp if "tp" in subject.options or case.tp > 1 else None,
        settings=dict(subject.options),
    )
