"""Turns a log into one answer: what happened, why, the first step, and a run that would work."""

from __future__ import annotations

import re
import shlex
from itertools import product
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.version import REFERENCE
from turbofit.logs import log_events as events
from turbofit.logs.account import cures
from turbofit.logs.answer import Advice, Diagnosis, Draft, Others, Read, evidence
from turbofit.logs.case import LogCase
from turbofit.logs.causes import what_to_send
from turbofit.logs.death import IN_DIAGNOSIS
from turbofit.logs.facts import read_runs
from turbofit.logs.log_reader import log_lines
from turbofit.logs.rules import PEERS, drafts_of
from turbofit.memory.versions import check_release, is_legacy
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from turbofit.core.machine import Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan, Remedy

#: By the kind of an answer: kinds that are its reason, and are answered in its place.
_REASONS: Final = {
    "request_failed": ("request_rejected", "bad_image", "wrong_model_name"),
    "aborted": ("interrupted",),
    "engine_gone": ("interrupted",),
    "unknown": ("interrupted",),
}
_RANKS: Final = {"cause": 0, "refusal": 1, "consequence": 2, "notice": 3}
_SHOWN: Final = ("tp", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
                 "session_len", "dtype", "quant_policy")  # fmt: skip
_TOGETHER: Final = ("tp", "cache_max_entry_count", "max_batch_size", "session_len")
_LIMITS: Final = ("max_dynamic_patch", "max_pixels_per_image")
_VARIABLE: Final = re.compile(r"\b([A-Z][A-Z0-9_]+)=(\S+?)[:;,]?(?=\s|$)")
_SHARE: Final = re.compile(r"cache[-_]max[-_]entry[-_]count")
_NO_ADVICE: Final = Advice(model="", on="", fits=None, verdict="")
_LOADED_HERE: Final = (
    "this log ran out of memory while it loaded there: where nothing else was on the cards, the"
    " account is too low, and a quantised variant or more GPUs are what helps"
)


def diagnose(
    chunks: Iterable[bytes],
    *,
    model: str | None = None,
    on: str | None = None,
    hang: bool = False,
    lmdeploy: str | None = None,
) -> Diagnosis:
    """Explain a log; returns the diagnosis.

    Args:
        chunks: the log's bytes, in pieces.
        model: the model, if the log does not name it or names it wrongly.
        on: the machine, if the log does not describe it or describes it wrongly.
        hang: whether the program stands still, which no line of a log says.
        lmdeploy: the release, if the log does not print it or prints it wrongly.

    Raises:
        UsageError: ``model``, ``on`` or ``lmdeploy`` has no possible meaning.
    """
    check_release(lmdeploy or REFERENCE)
    runs = read_runs(log_lines(chunks))
    for facts in runs:
        facts.subject.version = lmdeploy or facts.subject.version
    cases = [LogCase(facts, model=model, on=on, hangs=hang) for facts in runs]
    drafts = [(draft, case) for case in cases for draft in drafts_of(case)]
    drafts.sort(key=lambda pair: _order(pair[0]))
    last = cases[-1]
    if last.subject.foreign:
        return _foreign(last, [draft for draft, _ in drafts])
    reasons = _REASONS.get(drafts[0][0].kind, ()) if drafts else ()
    drafts.sort(key=lambda pair: pair[0].kind not in reasons)
    nothing = Draft(
        kind="unknown",
        line=0,
        what="turbofit recognises no error in this log",
        planned=last.has_all,
        unknown=("what happened",),
    )
    best, case = drafts[0] if drafts else (nothing, last)
    also = {
        draft.kind: f"line {draft.line}: {draft.what or draft.quoted}"
        for draft, _ in reversed(drafts)
        if draft.kind != best.kind and draft.rank != "notice" and draft.line != best.line
    }
    return _answer(case, best, tuple(also.values())[::-1])


def _order(draft: Draft) -> tuple[int, int]:
    """Return the sort key of a draft: its rank, then its line.

    Among refusals (exceptions that no row knows) the last line comes first, as Python prints the
    decisive exception last.
    """
    rank = _RANKS[draft.rank]
    return rank, -draft.line if rank == 1 else draft.line


def _answer(case: LogCase, draft: Draft, also: tuple[str, ...]) -> Diagnosis:
    known = bool(draft.what) and draft.kind not in ("unknown", IN_DIAGNOSIS["stalled"])
    lacked = draft.missing.bytes if draft.missing else None
    ways = cures(case, draft.phase, draft.by_others, lacked) if draft.short else ()
    would_work, lacks = _worked(case, draft, ways)
    changes = _steps(case, draft, would_work or _NO_ADVICE, ways)
    send, what = draft.send, draft.what
    unknown = draft.unknown or (() if known else ("what caused it",))
    if not known:
        what, send = (
            what or f"turbofit does not know the cause from this log: {draft.quoted}",
            (*send, *_to_send(case, draft)),
        )
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


def _to_send(case: LogCase, draft: Draft) -> tuple[str, ...]:
    still, found = draft.kind == IN_DIAGNOSIS["stalled"], bool(draft.evidence)
    marks = {
        draft.quoted: True, "lmdeploy": case.subject.of_lmdeploy, "(still)": still,
        "(nothing)": not found, "(error)": found and not still,
        "(no command)": case.facts.begun_at is None,
    }  # fmt: skip
    return what_to_send(" ".join(word for word, holds in marks.items() if holds))


def _steps(
    case: LogCase, draft: Draft, worked: Advice, ways: Sequence[tuple[Remedy, Plan]]
) -> tuple[str, ...]:
    """Return the steps to take, in order, without those that contradict the plan or the log.

    The step that frees the cards is first. Changes that fit by the account come before general
    advice. A step that the run had already taken is left out, and so is a change of the cache's
    ratio where no ratio helps.
    """
    fits, of_lmdeploy = worked.fits, case.subject.of_lmdeploy
    share = any(_SHARE.search(remedy.change) for remedy, _ in ways)
    vain = fits is False or (draft.short and case.has_account and not share)
    steps = [step for step in draft.changes if not _idle(case, step, vain=vain)]
    own = [remedy.change for remedy in worked.remedies]
    if draft.short and fits is not None:
        if fits and not ways:
            told = (f"--{name.replace('_', '-')} {worked.settings[name]}" for name in _TOGETHER)
            own = [f"these settings together: {' '.join(told)}"] if of_lmdeploy else []
        steps = own if own and of_lmdeploy else [*own, *steps]
    elif vain and draft.changes:
        steps = steps or own
    return tuple(filter(None, dict.fromkeys((draft.free, *steps))))


def _idle(case: LogCase, step: str, *, vain: bool) -> bool:
    """Return whether a step is useless: the run had taken it, or it changes the ratio in vain.

    ``vain``: no ratio of the cache helps.
    """
    set_ = case.subject.variables
    did = any(set_.get(name) == value for name, value in _VARIABLE.findall(step))
    return did or (vain and _SHARE.search(step) is not None)


def _worked(
    case: LogCase, draft: Draft, ways: Sequence[tuple[Remedy, Plan]]
) -> tuple[Advice | None, tuple[str, ...]]:
    """Return a run that would have worked, or None with the facts that are missing to find it."""
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
    return _planned(case, draft, model, machine), ()


def _planned(case: LogCase, draft: Draft, model: Model, machine: Machine) -> Advice:
    """Return the best plan for the log's model and cards.

    If such a plan fits, it keeps the log's ``tp`` and leaves other programs their memory on the
    cards. The plan is for the log's release of LMDeploy if that is old, else for the reference
    release.
    """
    degree = case.told_tp or (case.tp if case.tp > 1 else None)
    version, given = (case.version, degree) if case.subject.of_lmdeploy else (None, None)
    asked = {"model": model, "lmdeploy": version if version and is_legacy(version) else None}
    places = dict.fromkeys((machine.with_used(draft.by_others), machine))
    refused = ""
    for tp, on in product(dict.fromkeys((given, None)), places):
        plan, verdict = _tried(**asked, on=on, tp=tp)
        if plan is not None and plan.fits:
            break
        refused = refused or (f"--tp {tp} is not kept: {verdict}" if tp else "")
    else:
        refused = ""  # nothing fits, whatever the degree
    if on is not next(iter(places)):
        verdict = f"once the cards are free: {verdict}"
    if plan is None:
        return Advice(model=model.name, on=case.named(on), fits=None, verdict=verdict)
    advice = _of_plan(case, plan, on, plan.remedies, "" if tp else refused)
    loading = draft.short and draft.phase == "weights" and not draft.by_others
    if plan.fits and loading and version and plan.parallel.tp <= case.tp:
        verdict = f"by turbofit's account it {plan.verdict}"
        return replace(advice, fits=None, verdict=verdict, note=_LOADED_HERE)
    return replace(advice, verdict=verdict)


def _tried(**asked: Any) -> tuple[Plan | None, str]:
    """Return the plan of a request, and its verdict; if refused, None and the reason."""
    try:
        plan = best_plan(PlanRequest.of(**asked), compares_limits=False)
    except TurbofitError as exc:
        return None, f"{exc.message} ({exc.hint})"
    return plan, plan.verdict


def _of_plan(
    case: LogCase, plan: Plan, machine: Machine, remedies: tuple[Remedy, ...], note: str = ""
) -> Advice:
    values: dict[str, object] = {"engine": plan.engine.name}
    for name in _SHOWN if plan.engine.on_torch else (*_SHOWN, "communicator"):
        each = [getattr(group.settings, name) for group in plan.group_plans()]
        values[name] = each[0] if len(set(each)) == 1 else " | ".join(sorted(set(map(str, each))))
    limits = {name: getattr(plan.limits, name) for name in _LIMITS}
    limits = {"replicas": plan.parallel.replicas, **limits}
    values |= {name: limit for name, limit in limits.items() if limit is not None}
    command = shlex.join(plan.serve.argv) if plan.serve else ""
    if plan.engine.of_lmdeploy and (is_legacy(plan.engine.version) or plan.serve is None):
        command = shlex.join(plan.commands[0].argv) if plan.fits else ""
    return Advice(
        model=plan.model.name,
        on=case.named(machine),
        fits=plan.fits,
        verdict=plan.verdict,
        settings=values if plan.fits else {},
        command=command,
        note="; ".join(filter(None, (*_notes(case, plan, command), note))),
        remedies=remedies,
    )


def _notes(case: LogCase, plan: Plan, command: str) -> Iterator[str]:
    """Yield what to know before the settings are used."""
    if plan.engine.of_lmdeploy and case.subject.of_lmdeploy:
        assumed = f", {case.assumption}" if case.assumption else ""
        yield f"for LMDeploy {plan.engine.version}{assumed}"
    if (copies := plan.parallel.replicas) > 1 and command.startswith("lmdeploy"):
        own = "its own CUDA_VISIBLE_DEVICES and --server-port"
        yield f"one process for each group of GPUs: {copies} of these, each with {own}"


def _foreign(case: LogCase, drafts: Sequence[Draft]) -> Diagnosis:
    """Return the answer to another engine's log: its last error and missing bytes, but no cause."""
    last = max(drafts, key=lambda draft: (draft.short, -_RANKS[draft.rank]), default=None)
    said = f"its last error: {last.quoted}" if last and last.quoted else "no line tells of an error"
    return Diagnosis(
        kind="unknown",
        phase="unknown",
        what=f"a log of {case.subject.foreign}, which turbofit does not explain; {said}",
        missing=last.missing if last else None,
        unknown=("what caused it",),
        evidence=last.evidence[:1] if last else (),
        read=_read(case),
    )


def _read(case: LogCase) -> Read:
    facts, subject = case.facts, case.subject
    turbomind = (events.CacheBudget, events.Slab, events.KvBlocks, events.LegacyCuda,
                 events.CudaError, events.PeerMissing)  # fmt: skip
    engine = subject.foreign.lower() or ("pytorch" if subject.on_pytorch else None)
    if any(facts.first(kind) for kind in turbomind):
        engine = "turbomind"
    return Read(
        lines=subject.lines,
        engine=engine,
        version=subject.version,
        model=case.model.name if case.model else None,
        machine=case.on,
        tp=case.tp if "tp" in subject.options or case.tp > 1 else None,
        settings=dict(subject.options),
    )
