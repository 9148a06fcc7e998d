"""Turns a log into one answer: what happened, why, the first step, and a run that would work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Plan, Remedy
from turbofit.core.version import REFERENCE
from turbofit.logs import log_events as events
from turbofit.logs.account import logged_cache
from turbofit.logs.answer import Advice, Diagnosis, Draft, Others, Read, evidence
from turbofit.logs.case import LEAST_SHARE, LogCase
from turbofit.logs.causes import text_of, what_to_send
from turbofit.logs.death import IN_DIAGNOSIS
from turbofit.logs.facts import OF_PROGRAM, RAISED, read_runs
from turbofit.logs.log_reader import log_lines
from turbofit.logs.next_run import SHARE, NextRun, largest_share, next_run
from turbofit.logs.rules import possible_answers
from turbofit.logs.steps import steps_of
from turbofit.memory.versions import check_release, is_legacy
from turbofit.model.presets import lighter_checkpoints
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest

#: By the kind of the best answer: kinds that are its reason and are answered in its place.
_REASONS: Final = {
    "request_failed": ("request_rejected", "bad_image", "wrong_model_name"),
    "aborted": ("interrupted",),
    "engine_gone": ("interrupted",),
    "unknown": ("interrupted",),
}
_RANKS: Final = {"cause": 0, "refusal": 1, "consequence": 2, "notice": 3, "remark": 4}
_SHOWN: Final = ("tp", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
                 "session_len", "dtype", "quant_policy")  # fmt: skip
_LIMITS: Final = ("max_dynamic_patch", "max_pixels_per_image")
#: The most lighter checkpoints that are tried in the place of a model that does not fit.
_LIGHTER: Final = 4
_ONCE_FREE: Final = "once the cards are free: "
#: Kinds of answers that a person's words can have; every other kind needs a program's line.
_IN_WORDS: Final = ("unknown", "out_of_memory")
#: Exceptions that packages of different releases raise beside each other.
_OF_VERSIONS: Final = re.compile(r"(?:Attribute|Type|Key|Import|Name|Assertion|Implemented)Error")
#: What the evidence says of a line with a row in `presets/causes.yaml`.
_ROW: Final = "the message"


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
        hang: whether the user says that the program stands still; no line of a log shows it.
        lmdeploy: the release, if the log does not print it or prints it wrongly.

    Raises:
        UsageError: ``model``, ``on`` or ``lmdeploy`` cannot be read.
    """
    check_release(lmdeploy or REFERENCE)
    runs = read_runs(log_lines(chunks))
    for facts in runs:
        facts.subject.version = lmdeploy or facts.subject.version
    told = hang or any(facts.told_still for facts in runs)
    cases = [LogCase(facts, model=model, on=on, hangs=told) for facts in runs]
    last = cases[-1]
    if last.subject.foreign:
        return Diagnosis(
            kind="unknown",
            phase="unknown",
            what=f"a log of {last.subject.foreign}, which turbofit does not explain",
            unknown=("what caused it",),
            read=_read(last),
        )
    drafts = _in_order(cases)
    nothing = Draft(
        kind="unknown",
        line=0,
        what="turbofit recognises no error in this log",
        planned=last.has_all,
        unknown=("what happened",),
    )
    best, case = drafts[0] if drafts else (nothing, last)
    # For each other kind its best draft, in the order of the drafts.
    also = {
        draft.kind: f"line {draft.line}: {draft.what or draft.quoted}"
        for draft, _ in reversed(drafts)
        if draft.kind != best.kind and draft.rank != "notice" and draft.line != best.line
    }
    return _answer(case, best, tuple(also.values())[::-1])


def _in_order(cases: Sequence[LogCase]) -> list[tuple[Draft, LogCase]]:
    """Return all possible answers with their runs, the best first; the last run that died wins."""
    drafts = [(draft, case) for case in cases for draft in possible_answers(case)]
    ended = [case for draft, case in drafts if draft.rank in ("cause", "refusal")]

    def order(pair: tuple[Draft, LogCase]) -> tuple[bool, int, bool, int]:
        """Return the sort key: whether another run died last, the kind of answer, the line.

        A cause comes first, a notice last. Of refusals the lines with a row come first; of these,
        as of the others, the last line comes first, since Python prints the decisive exception
        last.
        """
        draft, case = pair
        rank, refused = _RANKS[draft.rank], draft.rank == "refusal"
        other = bool(ended) and case is not ended[-1]
        return other, rank, refused and not draft.by_row, -draft.line if refused else draft.line

    drafts.sort(key=order)
    reasons = _REASONS.get(drafts[0][0].kind, ()) if drafts else ()
    return sorted(drafts, key=lambda pair: pair[0].kind not in reasons)


def _answer(case: LogCase, draft: Draft, also: tuple[str, ...]) -> Diagnosis:
    """Return the answer: a draft with its steps, its plan and what the log leaves unknown.

    ``also``: the other troubles of the log, in words.
    """
    known = bool(draft.what) and draft.kind not in ("unknown", IN_DIAGNOSIS["stalled"])
    following = next_run(case, draft)
    would_work, lacks = _worked(case, draft, following)
    changes = steps_of(case, draft, would_work, following)
    others = Others(message=draft.kind, had=draft.possible, tried=changes)
    if not known:
        draft = replace(
            draft,
            kind="unknown",
            phase="unknown",
            what=draft.what or f"{draft.where}: {draft.quoted}",
            unknown=draft.unknown or ("what caused it",),
            send=(*draft.send, *_to_send(case, draft)),
        )
    elif following.fits and not logged_cache(case) and not draft.unsized:
        draft = replace(draft, send=(*draft.send, text_of("free in log")))
    peers = case.facts.first(events.PeerMissing)
    if peers and known and draft.kind != "peer_warning":
        why = (*draft.why, f"the peer access warning is not the cause: {text_of('no peers')}")
        lines = (*draft.evidence, evidence(peers, "GPUs without peer access"))
        draft = replace(draft, why=why, evidence=lines)
    assumed = (f"which of its sizes the card has: {case.assumed}",) if case.assumed else ()
    unknown = dict.fromkeys((*draft.unknown, *lacks, *assumed))
    first = next(iter((*changes, *draft.send)), "")
    return Diagnosis(
        kind=draft.kind,
        phase=draft.phase,
        what=draft.what,
        why=draft.why,
        others=others if others.had and not known else None,
        held=draft.held,
        missing=draft.missing,
        missing_in_all=draft.missing_in_all,
        changes=changes if known else (),
        would_work=would_work,
        send=draft.send,
        first=first,
        unknown=tuple(unknown),
        also=also,
        evidence=tuple(sorted(draft.evidence, key=lambda row: row.line)),
        read=_read(case),
    )


def _to_send(case: LogCase, draft: Draft) -> tuple[str, ...]:
    """Return what the user should send so that the cause can be found; the log lacks all of this.

    The marks in parentheses say what the log lacks, and select texts (`what_to_send`).
    """
    still, found = draft.kind == IN_DIAGNOSIS["stalled"], bool(draft.evidence)
    cut = case.facts.cut is not None and case.facts.cut.line == draft.line
    begun, line = case.facts.begun_at or case.facts.command_at, draft.line
    starts = begun is not None and begun < line
    traced = any(mark.stack for mark in case.facts.marks if mark.line == line)
    untraced = cut or (RAISED.match(draft.quoted) and not traced)
    asks_versions = _OF_VERSIONS.search(draft.quoted) and not case.subject.has_versions
    marks = {
        draft.quoted: True, "(no versions)": asks_versions,
        "lmdeploy": case.subject.of_lmdeploy, "(still)": still,
        "(nothing)": not found, "(no start)": found and not still and not starts,
        "(no traceback)": untraced, "(whole)": starts and not untraced,
        "(no command)": begun is None,
    }  # fmt: skip
    return what_to_send(" ".join(word for word, holds in marks.items() if holds))


def _worked(
    case: LogCase, draft: Draft, following: NextRun
) -> tuple[Advice | None, tuple[str, ...]]:
    """Return a run that works by the account; or None, with the facts that a plan lacks.

    If changes cure the log's own run (``following.ways``), the run has the first of these changes.
    Else it is the best plan for the log's model and cards.
    """
    model, machine, ways = case.model, case.machine, following.ways
    lacks = tuple(_lacks(case, ways)) if draft.planned else ()
    if model is None or machine is None or lacks or not draft.planned:
        return None, lacks
    if not ways:
        bound = following.share or largest_share(case, draft)
        advice = _planned(case, draft, model, machine, bound)
    else:
        on = machine.with_used(0 if draft.emptied else draft.by_others)
        advice = _of_plan(case, ways[0][1], on, tuple(remedy for remedy, _ in ways))
    if ways and draft.emptied:
        advice = replace(advice, verdict=f"{_ONCE_FREE}{advice.verdict}")
    elif following.fits and advice.fits:
        # By the account the log's run fits, too, and yet it died: so the verdict is no proof.
        verdict = f"{advice.verdict.removeprefix(_ONCE_FREE)}, by the account"
        verdict = verdict if draft.all_own else f"{_ONCE_FREE}{verdict}"
        advice = replace(advice, fits=None, verdict=verdict)
    return advice, ()


def _lacks(case: LogCase, ways: Sequence[object]) -> Iterator[str]:
    """Yield the facts that a plan lacks: the model, the machine."""
    name, of_class = case.subject.model, case.subject.model_class
    if case.model is None and name:
        yield f"what {name} is: it has no preset here, so name its folder or a preset with --model"
    elif case.model is None:
        of_class = f" of the class {of_class}" if of_class else ""
        yield f"which model{of_class} it was: name it with --model"
    if case.machine is None or (case.guessed and not ways):
        yield f"which machine it was: {case.no_machine or 'name it with --on'}"


def _planned(
    case: LogCase, draft: Draft, model: Model, machine: Machine, bound: float | None
) -> Advice:
    """Return the best plan for the log's model and cards.

    The first choice is a plan with the log's ``tp``, while other programs keep their memory. It is
    a plan for the log's release of LMDeploy if that release is old, else for the reference
    release. ``bound``: the highest cache ratio that the plan may have; None for no bound.
    """
    version = case.version if case.subject.of_lmdeploy else None
    beside_others, refused = machine.with_used(draft.by_others), ""
    degrees = dict.fromkeys((case.shown_tp if case.subject.of_lmdeploy else None, None))
    for tp, on in product(degrees, dict.fromkeys((beside_others, machine))):
        asked = {"model": model, "lmdeploy": version if version and is_legacy(version) else None}
        plan, verdict = _within(case, bound, **asked, on=on, tp=tp)
        if plan is not None and plan.fits:
            break
        refused = refused or (f"--tp {tp} is not kept: {verdict.partition(' (')[0]}" if tp else "")
    else:
        refused = ""  # nothing fits at any degree
        if lighter := _lighter(case, draft, model, machine, asked["lmdeploy"]):
            return lighter
    if on is not beside_others or draft.emptied:
        verdict = f"{_ONCE_FREE}{verdict}"
    if plan is None:
        return Advice(model=model.name, on=case.named(on), fits=None, verdict=verdict)
    advice = _of_plan(case, plan, on, plan.remedies, "" if tp else refused)
    return _doubted(case, draft, plan, replace(advice, verdict=verdict))


def _lighter(
    case: LogCase, draft: Draft, model: Model, machine: Machine, lmdeploy: Any
) -> Advice | None:
    """Return a plan for a lighter checkpoint of a model that does not fit, or None.

    The bound on the share of the cache is for the same weights, so that it does not hold here.
    """
    if draft.emptied:
        return None
    own, verdict = _tried(model=model, on=machine, lmdeploy=lmdeploy)
    if own is None or own.fits:
        return None
    room = sum(gpu.usable for gpu in machine.gpus)
    kin = (one for one in lighter_checkpoints(model) if one.weight_bytes < room)
    for checkpoint in islice(kin, _LIGHTER):
        plan, _ = _tried(model=checkpoint, on=machine, lmdeploy=lmdeploy)
        if plan is not None and plan.fits:
            why = f"{model.name} does not fit: {verdict.split(f'{model.name}: ')[-1]}"
            advice = _of_plan(case, plan, machine, plan.remedies, why)
            return replace(advice, in_place_of=model.name)
    return None


def _doubted(case: LogCase, draft: Draft, plan: Plan, advice: Advice) -> Advice:
    """Return the advice of a plan; in doubt if the log's run died while it loaded its weights.

    A plan for more cards than the log's run had is not in doubt.
    """
    loading = draft.short and draft.phase == "weights" and not draft.by_others
    known = case.subject.of_lmdeploy and case.version
    if plan.fits and loading and known and plan.tp <= case.tp:
        verdict = f"by turbofit's account it {plan.verdict}"
        return replace(advice, fits=None, verdict=verdict, note=text_of("loaded here"))
    return advice


def _within(case: LogCase, bound: float | None, **asked: Any) -> tuple[Plan | None, str]:
    """Return the best plan whose share of the cache is at most ``bound``, and its verdict.

    A plan with another engine or degree than the log's may exceed the bound if no plan below the
    bound fits. If the bound is too low for any plan, there is none.
    """
    plan, verdict = _tried(**asked)
    shares = [engine.settings.cache_max_entry_count for engine in plan.engines] if plan else []
    if plan is None or bound is None or not plan.backend.of_lmdeploy or max(shares) <= bound:
        return plan, verdict
    if bound <= LEAST_SHARE:
        return None, f"no plan has a share of the cache as low as {bound:g}"
    bounded, bounded_verdict = _tried(**asked, cache_max_entry_count=bound)
    same = (plan.backend.name, plan.tp) == (case.engine.name, case.tp)
    if not same and not (bounded and bounded.fits):
        return plan, verdict
    if bounded is not None:
        kept = (remedy for remedy in bounded.remedies if SHARE not in remedy.change)
        bounded = replace(bounded, remedies=tuple(kept))
    return bounded, bounded_verdict


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
    """Return a plan as advice: its settings, its command and notes."""
    values: dict[str, object] = {"engine": plan.backend.name}
    for name in _SHOWN if plan.backend.on_torch else (*_SHOWN, "communicator"):
        each = [getattr(engine.settings, name) for engine in plan.engines]
        values[name] = each[0] if len(set(each)) == 1 else " | ".join(sorted(set(map(str, each))))
    if not plan.backend.of_lmdeploy:
        del values["cache_max_entry_count"]  # such an engine makes no cache ahead
    limits = {name: getattr(plan.promise.limits, name) for name in _LIMITS}
    given_limits = {name: limit for name, limit in limits.items() if limit is not None}
    command = shlex.join(plan.serve.argv) if plan.serve else ""
    # turbofit serves no plan of an old release: there the command is LMDeploy's own.
    if plan.backend.of_lmdeploy and (is_legacy(plan.backend.version) or plan.serve is None):
        own = [engine.command for engine in plan.engines if engine.command]
        command = shlex.join(own[0].argv) if plan.fits and own else ""
    return Advice(
        model=plan.model.name,
        on=case.named(machine),
        fits=plan.fits,
        verdict=plan.verdict,
        settings={**values, "replicas": plan.replicas, **given_limits} if plan.fits else {},
        command=command,
        note="; ".join(filter(None, (*_notes(case, plan, command), note))),
        remedies=remedies,
    )


def _notes(case: LogCase, plan: Plan, command: str) -> Iterator[str]:
    """Yield what a user must know before he uses the settings."""
    if plan.backend.of_lmdeploy and case.subject.of_lmdeploy:
        assumed = f", {case.assumption}" if case.assumption else ""
        yield f"for LMDeploy {plan.backend.version}{assumed}"
    rule = plan.model.image_rule
    limit = plan.promise.limits.image_limit if rule else None
    if rule and limit and limit < rule.checkpoint_limit and command.startswith("lmdeploy"):
        yield f"no option of this command keeps images to {rule.limit_name} {limit}: clients must"
    if (copies := plan.replicas) > 1 and command.startswith("lmdeploy"):
        own = "its own CUDA_VISIBLE_DEVICES and --server-port"
        yield f"one process for each group of GPUs: {copies} of these, each with {own}"


def _read(case: LogCase) -> Read:
    """Return what the log says of the run itself."""
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
        tp=case.shown_tp,
        settings=dict(subject.options),
    )


def has_words(text: str) -> bool:
    """Return whether a text has several words; Chinese has punctuation between them, no space."""
    return bool(re.search(r"\s|[，。；：！？]", text.strip()))


def refuse_prose(text: str, found: Diagnosis) -> None:
    """Refuse a person's text without any line of a program.

    Raises:
        UsageError: the text has no line of a program.
    """
    by_row = any(line.tells == _ROW for line in found.evidence)
    if by_row or found.kind not in _IN_WORDS or OF_PROGRAM(text):
        return
    what = "this describes a crash" if text.strip() else "the log is empty"
    raise UsageError(
        f"{what}; diagnose reads the lines of programs, and here is none",
        hint="paste the last 100 lines of the log; for settings that fit: turbofit plan"
        f" {found.read.model or 'MODEL'} --on {found.read.machine or 'SPEC'}",
    )
