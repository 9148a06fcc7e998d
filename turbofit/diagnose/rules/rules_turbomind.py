"""TurboMind of any release: out of memory, on a card or of page-locked memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.version import REFERENCE
from turbofit.diagnose.answer import Missing
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.logged_cache import logged_cache, lower_ratio, with_cache
from turbofit.diagnose.rules.rules_torch import phase_of
from turbofit.observe.engine_end import diagnosed, told_kind
from turbofit.observe.log_events import (
    CudaError,
    Frame,
    KvBlocks,
    LegacyCuda,
    VisionSetup,
)
from turbofit.observe.stages import out_of_memory, phase_of_death, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.facts import LogFacts
    from turbofit.observe.stages import Phase

_NOT_PRINTED: Final = Missing(
    bytes=None, basis="unknown", note="TurboMind does not print what it asked"
)
_NO_FREE: Final = "what was free: the line `Object cache budget` comes with TM_LOG_LEVEL=INFO"
_ENOUGH: Final = (
    "what took the rest: by turbofit's account these settings leave room on such cards (other"
    " programs, other settings, another LMDeploy)"
)


def turbomind_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """The first lack of memory that TurboMind itself tells of."""
    for mark in case.facts.marks:
        event = mark.event
        if isinstance(event, LegacyCuda) and event.out_of_memory:
            phase = _phase_by_frames(case.facts, mark)
            said = out_of_memory("TurboMind", phase, event.where)
            what = said.replace(when("serving"), "after its cache was made")
            yield _out_of_memory(case, mark, phase, what)
            return
        if isinstance(event, CudaError) and event.out_of_memory:
            yield _of_newer(case, mark, event)
            return


def _of_newer(case: LogCase, mark: LogEvent, event: CudaError) -> RuleAnswer:
    """TurboMind since 0.14, which prints the calls of the thread that aborts."""
    frames = _stack_names(case.facts, mark)
    images = case.facts.first(VisionSetup) is not None
    phase = phase_of_death(case.facts.course.reached, frames, images=images)
    if told_kind(event, case.turbomind.log.pinned_call) == "host_memory":
        return _page_locked(case, mark, when(phase, *frames[:1]))
    phase = "unknown" if phase == "starting" else phase
    what = f"{out_of_memory('LMDeploy', phase, *frames[:1])} and aborted"
    return _with_account(case, _out_of_memory(case, mark, phase, what))


def _out_of_memory(case: LogCase, mark: LogEvent, phase: Phase, what: str) -> RuleAnswer:
    """The answer for any release."""
    cache = logged_cache(case)
    far = "how far it had come: no line before the error says it"
    answer = RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=what,
        line=mark.line,
        missing=_NOT_PRINTED,
        unknown=(far,) if phase == "unknown" else (),
        evidence=(evidence(mark, "TurboMind's own out-of-memory error"),),
        changes=tuple(_changes(case, phase)),
        planned=True,
        by_others=cache.others if cache else 0,
    )
    return with_cache(case, answer, cache)


def _changes(case: LogCase, phase: Phase) -> Iterator[str]:
    """What leaves more room, in the phase where it was missing."""
    if phase != "weights":
        yield from lower_ratio(case)
    if phase in ("weights", "unknown"):
        loading = "if it was still loading weights: " if phase == "unknown" else ""
        yield f"{loading}more GPUs (--tp), a quantised variant, or freer cards"
    if phase in ("warm-up", "text"):
        yield "lower --max-prefill-token-num: a forward's tensors grow with it"


def _stack_names(facts: LogFacts, mark: LogEvent) -> list[str]:
    """The stack after a fault, innermost first, without what only checks."""
    names = []
    for later in facts.marks[facts.marks.index(mark) + 1 :]:
        if isinstance(later.event, Frame):
            names.append(later.event.name)
        elif names:
            break
    return [name for name in names if not name.startswith("TM_")]


def _page_locked(case: LogCase, mark: LogEvent, at: str) -> RuleAnswer:
    """The same words as for a GPU, from the call that asks the host; of that release alone."""
    certain = case.facts.subject.version is not None and case.turbomind.doubt is None
    what = f"LMDeploy got no page-locked host memory {at} and aborted; no GPU was full"
    return RuleAnswer(
        kind=diagnosed("host_memory"),
        phase="host RAM",
        what=what if certain else "",
        line=mark.line,
        possible=(
            "RAM, or a container's limit, that was full: the line of the source asks for"
            f" page-locked host memory in LMDeploy {REFERENCE}",
            "GPU memory that was full: the same line of another release",
        ),
        missing=_NOT_PRINTED,
        evidence=(evidence(mark, "the abort, in the allocator of page-locked memory"),),
        changes=(
            "free RAM or raise the container's memory limit; fewer replicas: each rank has such"
            " buffers",
        ),
        planned=True,
    )


def _with_account(case: LogCase, answer: RuleAnswer) -> RuleAnswer:
    """The answer with what turbofit forecasts of these settings: what lacks in all, and why.

    What was free for the cache is the log's: it counts whatever else was on the card.
    """
    cache = logged_cache(case)
    if cache is not None:
        note = "for all that these settings let in"
        forecast = case.forecast(free_at_cache=cache.free, cache_max_entry_count=cache.ratio)
    elif answer.phase == "weights":
        note, forecast = "for the whole load", case.forecast()
    else:
        return replace(answer, unknown=(*answer.unknown, _NO_FREE))
    if forecast is None:
        return answer
    if case.facts.subject.version is None:
        answer = replace(answer, unknown=(*answer.unknown, f"assumed LMDeploy {REFERENCE}"))
    short = max(
        (gpu.load_peak if cache is None else gpu.peak) - gpu.usable for gpu in forecast.gpus
    )
    if short <= 0:
        return replace(answer, unknown=(*answer.unknown, _ENOUGH))
    return replace(
        answer,
        why=(*answer.why, f"by turbofit's account: {forecast.verdict}"),
        missing_in_all=Missing(bytes=short, basis="formula", note=f"{note}, by the account"),
    )


def _phase_by_frames(facts: LogFacts, mark: LogEvent) -> Phase:
    """By the Python stack, else by the file that allocates and the cache that was printed."""
    phase = phase_of(mark.stack)
    if phase == "vision":
        return phase
    if any(made.line < mark.line for made, _ in facts.every(KvBlocks)):
        return "serving"
    # Weights are allocated in memory_utils.cu, all else through the allocator.
    return "weights" if phase == "weights" or "memory_utils" in mark.text else "unknown"
