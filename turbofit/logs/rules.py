"""Makes the possible answers to one run of a log.

An answer comes from a row of `presets/causes.yaml`, from a kill or a hang, or from a log without a
fault. The sentences of a row are filled with figures. `out_of_memory` answers a lack of GPU memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.process.hidden import without_keys
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.logs import log_events as events
from turbofit.logs.answer import Draft, Holding, Missing, evidence, raised_in
from turbofit.logs.case import LogCase
from turbofit.logs.causes import Hit, Kind, Sentence, release_of, table, text_of
from turbofit.logs.death import IN_DIAGNOSIS, death
from turbofit.logs.facts import IN_WORDS, LogEvent, LogFacts
from turbofit.logs.out_of_memory import lack_of_memory
from turbofit.memory.versions import listed_since, written
from turbofit.planning.commands import option_since

#: The first compute capability (10.0) that builds for CUDA up to 12.6 do not know.
_FIRST_OF_CUDA_12_8: Final = 100
_FIRST_WITH_BFLOAT16: Final = 80
#: Functions that a program runs while it ends; an error in one is not the reason for its end.
_CLEANS_UP: Final = (
    "_loop_finally", "release", "__del__", "shutdown", "_exit_function", "atexit", "terminate",
    "__exit__", "_cleanup", "cleanup",
)  # fmt: skip
#: Last lines of a log after which an engine may stand still, by what the engine does then.
_STANDS: Final = {
    "TurboMind's cache or warm-up": re.compile(
        r"Object cache budget|slab_size|\[Gemm2\]|Warm-up lengths|UnifiedAttentionLayer::Forward"
    ),
    "NCCL's first collective": re.compile(r"NCCL INFO (?:comm |Channel|Connected|.*Init COMPLETE)"),
}


def figures_of(case: LogCase, mark: LogEvent, hit: Hit) -> dict[str, Any]:
    """Return by name the values that a row's sentences and condition may use; None if unknown.

    They are the log's options and facts, the groups of the row's pattern (numbers as integers), and
    the values that follow from these: of a group NAME_bytes, NAME in units.
    """
    told = {**case.subject.options, **case.subject.facts, **hit.fields, "said": hit.said}
    told = {
        name: int(text) if isinstance(text, str) and text.isdecimal() else text
        for name, text in told.items()
    }
    sizes = {
        name.removesuffix("_bytes"): format_bytes(int(text))
        for name, text in hit.fields.items()
        if name.endswith("_bytes")
    }
    return {**told, **sizes, **_of_cards(case, told), **_of_releases(case, mark, told)}


def _of_cards(case: LogCase, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name values about the cards, from the log or else from the machine.

    ``told``: the values that the log gives. ``arch`` is 86 for the compute capability 8.6.
    """
    arch, model, gpu = told.get("arch"), case.model, case.gpu
    if arch is None and gpu and gpu.compute_capability != NA:
        arch = gpu.compute_capability[0] * 10 + gpu.compute_capability[1]
    built = list(map(int, re.findall(r"(?:sm|compute)_(\d+)", str(told.get("built") or ""))))
    figures: dict[str, Any] = {
        "arch": arch,
        "no_bfloat16": arch if (arch or math.inf) < _FIRST_WITH_BFLOAT16 else None,
        "built_newest": max(built, default=None),
        "built_oldest": min(built, default=None),
        # Newer than the build that the log names, or than all up to CUDA 12.6.
        "too_new": (arch or 0) > max(built, default=_FIRST_OF_CUDA_12_8 - 1) or None,
        "too_old": (arch or math.inf) < min(built, default=0) or None,
    }
    visible = case.subject.visible
    alone = "tp" not in case.subject.options and (visible or 1) > 1
    figures |= {
        "linear_on_h20": told.get("linear") if gpu and "H20" in gpu.name else None,
        "visible": visible,
        # The cards beside the first, where several are visible and no degree was given.
        "unused_gpus": alone or None,
        "fits_one": None,
        "fits_none": None,
    }
    if model is not None and gpu is not None:
        one = model.weight_bytes < gpu.usable
        figures["fits_one" if one else "fits_none"] = (
            f"{model.name} is {format_bytes(model.weight_bytes)} of weights, and"
            f" {'one' if one else 'each'} of the cards has {format_bytes(gpu.usable)}"
        )
    return figures


def _of_releases(case: LogCase, mark: LogEvent, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name which releases of LMDeploy and Transformers know what the line names.

    ``told``: the values that the log gives, such as the name of an option or an architecture.
    """
    option, value, version = told.get("option"), told.get("value"), case.subject.version
    # A usage error names an option, or an argument with the value that is refused.
    asked = option or (f"{told.get('argument')} {value}" if value else None)
    written_so = str(option or "").replace("_", "-")
    named = (told.get(field) for field in ("type", "name", "imported"))
    name = str(next(filter(None, named), ""))
    since = listed_since(told.get("architecture") or "")
    own = mark.stack and re.search(r"[/\\]lmdeploy[/\\]", mark.stack[-1].path)
    return {
        "asked_option": asked,
        "option_since": option_since(tuple(str(asked or "").split())),
        "option_written": written_so
        if written_so != str(option or "") and option_since((written_so,))
        else None,
        "brought": release_of(name, dropped=False),
        "dropped": release_of(name, dropped=True),
        "listed_since": since,
        "too_old_for": version if since and version and written(version) < written(since) else None,
        "newer_lmdeploy": "a newer LMDeploy" if own else None,
    }


def sentence(text: Sentence, known: Mapping[str, Any]) -> str:
    """Fill a sentence with known values.

    The sentence's second form is used if the first form needs a value that is unknown.
    """
    first, second = (text, text) if isinstance(text, str) else text
    form = second if any(known.get(name) is None for name in names_of(first)) else first
    shown = {name: "?" if known.get(name) is None else known[name] for name in names_of(form)}
    return without_keys(form.format(**shown)) if form else ""


def names_of(text: str) -> set[str]:
    """Return the names of the ``{fields}`` in a sentence."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def explanation_of(mark: LogEvent, case: LogCase) -> Draft | None:
    """Return the answer of the first row that matches the line and whose condition holds.

    Without such a row an error is an unknown fault, and a known message is no answer: None.
    """
    for hit in mark.hits:
        row, known = hit.row, figures_of(case, mark, hit)
        if not row.when or known.get(row.when) is not None:
            break
    else:
        return None if isinstance(mark.event, events.KnownMessage) else _unknown_fault(mark)

    def said(texts: Iterable[Sentence]) -> tuple[str, ...]:
        return tuple(filter(None, (sentence(text, known) for text in texts)))

    kind, what = table().kinds.get(row.kind, Kind()), sentence(row.what, known)
    return Draft(
        kind=row.kind,
        line=mark.line,
        phase=(row.phase or kind.phase) if what else "unknown",
        what=what,
        rank=row.rank,
        why=said(row.why) if what else raised_in(mark),
        possible=said(row.possible),
        changes=said(row.change),
        unknown=said(row.unknown),
        evidence=(evidence(mark, "the message"),),
        planned=kind.plan,
    )


def drafts_of(case: LogCase) -> Iterator[Draft]:
    """Yield all possible answers to a run, in no particular order.

    `lack_of_memory` answers a line in which CUDA or torch says that GPU memory is missing, and
    `death` a kill by the kernel. Each other line is answered by its row of ``presets/causes.yaml``,
    whether or not it is also an event. A fault without a row is unknown.
    """
    facts = case.facts
    if short := next((mark for mark in facts.fatal if mark.short), None):
        yield lack_of_memory(case, short)
    for mark, kill in facts.every(events.HostKill)[:1]:
        end = death([kill])
        yield Draft(
            kind=IN_DIAGNOSIS["host_memory"],
            phase="host RAM",
            what=end.message,
            line=mark.line,
            held=(Holding(who=f"{kill.name}[{kill.pid}]", bytes=kill.rss, lines=(mark.line,)),),
            missing=Missing(bytes=None, basis="unknown", note="the kernel does not say how much"),
            evidence=(evidence(mark, "the kernel's killer and its victim"),),
            changes=(end.hint, text_of("grows")),
        )
    for mark in facts.fatal:
        counted = mark.short or isinstance(mark.event, events.HostKill)
        if not counted and (draft := explanation_of(mark, case)):
            yield _with_chain(draft, mark, facts)
    over = (events.WarmupFinished, events.ServerUp, events.CudaError, events.CheckFailed)
    if facts.waiting and not any(isinstance(mark.event, over) for mark in facts.marks):
        yield _waits_for_ever(case, facts.waiting)
    elif not facts.died:
        yield from _stands_still(case)
    yield from _quiet(case)


def _unknown_fault(mark: LogEvent) -> Draft:
    """Return the answer to an exception or a fault that no row knows.

    An exception in a clean-up is only a consequence of another error, and so are an exit and what
    Python raised while it handled another exception.
    """
    text = without_keys(mark.text.strip())
    if isinstance(mark.event, events.PythonError) and not mark.event.message and mark.stack:
        text = f"{text}: {without_keys(mark.stack[-1].code)}"
    cleans_up = any(frame.function in _CLEANS_UP for frame in mark.stack)
    why = (*raised_in(mark), *([text_of("cleans up")] if cleans_up else []))
    follows = mark.after or text.startswith("SystemExit") or cleans_up
    return Draft(
        kind="unknown",
        line=mark.line,
        rank="consequence" if follows else "refusal",
        why=why,
        evidence=(evidence(mark._replace(text=text), "the error itself"),),
        planned=isinstance(mark.event, events.CheckFailed),
    )


def _with_chain(draft: Draft, first: LogEvent, facts: LogFacts) -> Draft:
    """Add to an answer the exceptions that Python raised while it handled the answer's own."""
    lines, later = {first.line}, []
    for mark in facts.fatal:
        if mark.after in lines:
            lines.add(mark.line)
            later.append(evidence(mark, "raised while the first was handled"))
    followed = (f"while it was handled, {one.text} followed" for one in later)
    return replace(draft, why=(*draft.why, *followed), evidence=(*draft.evidence, *later))


def _waits_for_ever(case: LogCase, waiting: LogEvent) -> Draft:
    facts = case.facts
    run = [*(mark.event for mark in facts.marks), events.Backpressure(cause="memory")]
    end = death(run, known=(case.engine, case.settings))
    sizes: dict[type[Any], str] = {
        events.CacheBudget: "the cache's size", events.Slab: "the size of a block",
        events.WarmupLengths: "the lengths of the warm-up",
    }  # fmt: skip
    lines = [evidence(mark, tells) for kind, tells in sizes.items() if (mark := facts.first(kind))]
    missing = Missing(
        bytes=end.missing,
        basis="formula",
        note="of cache, for the blocks of one warm-up request",
        doubt=getattr(facts.first_event(events.Slab), "slab_size", 0),
    )
    return Draft(
        kind=IN_DIAGNOSIS["hang"],
        phase="start-up hang",
        what=end.message if end.missing else "",
        line=waiting.line,
        possible=(text_of("warm-up waits"),),
        why=(text_of("warm-up waits"),) if end.missing else (),
        missing=missing if end.missing else None,
        evidence=(evidence(waiting, "nothing can be admitted, to the log's end"), *lines),
        changes=(end.hint,),
        planned=True,
    )


def _stands_still(case: LogCase) -> Iterator[Draft]:
    """Yield an answer if the user or the last lines say that the engine stands still."""
    mark = case.facts.last or LogEvent(0, "")
    several = case.tp > 1 or (case.told_tp is None and case.machine is not None
                              and len(case.machine.gpus) > 1)  # fmt: skip
    steps = ("no p2p", "py-spy") if several or "NCCL" in mark.text else ("py-spy",)
    at = next((name for name, words in _STANDS.items() if words.search(mark.text)), "")
    what = f"it ends in {at}" if at else "it ends at this line"
    what = f"no line of this log tells of an error; {what}, and if it stands there:"
    if not case.hangs and (not at or _ready(case)):
        return
    yield Draft(
        kind=IN_DIAGNOSIS["stalled"],
        line=mark.line,
        rank="consequence",
        what=what,
        possible=(
            text_of("nccl waits" if several else "reads"),
            *([text_of("warm-up waits")] if "cache" in at else []),
        ),
        evidence=(evidence(mark, "the last news"),),
        changes=tuple(map(text_of, steps)),
    )


def _quiet(case: LogCase) -> Iterator[Draft]:
    """Yield the answers that need no fault: a healthy start, an unclear error, no peer access."""
    ready, facts = _ready(case), case.facts
    if ready:
        yield Draft(
            kind="healthy",
            phase="none",
            what="nothing failed in this log: the engine started (if it stands still: --hang)",
            line=ready.line,
            rank="notice",
            evidence=(evidence(ready, "the engine is ready"),),
        )
    elif facts.complaint:
        exits = any(mark.text.startswith("SystemExit") for mark in facts.fatal)
        yield Draft(
            kind="unknown",
            line=facts.complaint.line,
            rank="refusal" if exits else "notice",
            evidence=(evidence(facts.complaint, "the last line that reports an error"),),
            planned=case.has_all and IN_WORDS(facts.complaint.text) is not None,
        )
    if peers := facts.first(events.PeerMissing):
        yield Draft(
            kind="peer_warning",
            phase="peer access",
            what="only a warning: these GPUs have no peer access to each other",
            line=peers.line,
            rank="notice",
            why=(text_of("no peers"),),
            evidence=(evidence(peers, "the warning of LMDeploy up to 0.7.3"),),
            planned=True,
        )


def _ready(case: LogCase) -> LogEvent | None:
    """Return the line that shows a ready engine; None if the run died or a later line complains."""
    facts = case.facts
    ups = (facts.first(kind) for kind in (events.ServerUp, events.WarmupFinished, events.Answered))
    served = (mark for mark, one in facts.every(events.ServerFigures) if one.succeeded)
    ready = next(filter(None, (*ups, *served)), None)
    last = max((mark.line for mark in (*facts.fatal, facts.complaint) if mark), default=0)
    calm = ready is not None and not facts.died and last <= ready.line and not case.hangs
    return ready if calm else None
