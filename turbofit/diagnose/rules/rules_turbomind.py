"""TurboMind of any release: out of memory, on a card or of page-locked memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.version import REFERENCE
from turbofit.diagnose.answer import Missing
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.logged_cache import (
    START_ONCE,
    LoggedCache,
    cache_facts,
    double_start,
    logged_cache,
    lower_ratio,
)
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

_PINS: Final = (
    "LMDeploy {} pins 18.7 GiB of host memory a rank for InternVL, and dies of the same words when"
    " that is what it lacks"
)
_NOT_PRINTED: Final = Missing(
    bytes=None, basis="unknown", note="TurboMind does not print what it asked"
)
_NO_FREE: Final = "what was free: the line `Object cache budget` comes with TM_LOG_LEVEL=INFO"
_ENOUGH: Final = (
    "what took the rest: by turbofit's account these settings leave room on such cards (other"
    " programs, other settings, another LMDeploy)"
)
#: What a phase of an older engine is called by, in the frames of Python around it.
_VISION_WORDS: Final = ("vl/engine", "vl/model", "vision", "intern_vit", "visual")
_LOAD_WORDS: Final = ("process_weight", "load_weight", "create_shared_weights", "export", "load")


def turbomind_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """The first lack of memory that TurboMind itself tells of."""
    for mark in case.facts.marks:
        event = mark.event
        if isinstance(event, LegacyCuda) and event.out_of_memory:
            phase = _phase_by_frames(case.facts, mark)
            said = out_of_memory("TurboMind", phase, event.where)
            what = said.replace(when("serving"), "after its cache was made")
            yield _out_of_memory(case, mark, phase, what, legacy=True)
            return
        if isinstance(event, CudaError) and event.out_of_memory:
            yield _of_newer(case, mark, event)
            return


def _of_newer(case: LogCase, mark: LogEvent, event: CudaError) -> RuleAnswer:
    """TurboMind since 0.14, which prints the calls of the thread that aborts."""
    frames = stack_names(case.facts, mark)
    phase, engine = phase_of_fault(case.facts, frames), case.turbomind
    if told_kind(event, engine.log.pinned_call) == "host_memory":
        certain = case.facts.subject.version is not None and engine.doubt is None
        return _page_locked(mark, phase, frames, certain=certain)
    what = f"{out_of_memory('LMDeploy', phase, *frames[:1])} and aborted"
    return _out_of_memory(case, mark, phase, what, legacy=False)


def _out_of_memory(
    case: LogCase, mark: LogEvent, phase: Phase, what: str, *, legacy: bool
) -> RuleAnswer:
    """The answer for any release: an older one has no account, and may be started too often."""
    cache = None if phase == "weights" else logged_cache(case)
    why, held, lines = cache_facts(case, cache)
    unknown: list[str] = []
    in_all = None
    if not legacy:
        story, unknown, in_all = _by_the_account(case, cache, phase)
        why += story
    elif cache is not None and cache.assumed:
        unknown.append(f"the cache ratio: {cache.ratio:g} is LMDeploy's default")
    if phase == "unknown":
        unknown.insert(0, "how far it had come: no line before the error says it")
    version = case.facts.subject.version or ""
    if case.turbomind.log.pins_images:
        why.append(_PINS.format(version))
    lines.append(evidence(mark, "TurboMind's own out-of-memory error"))
    return RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=what,
        line=mark.line,
        why=tuple(why),
        held=tuple(held),
        missing=_NOT_PRINTED,
        missing_in_all=in_all,
        unknown=tuple(unknown),
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        changes=tuple(_changes(case, phase)),
        planned=True,
        others=cache.others if cache and not double_start(case) else 0,
    )


def _changes(case: LogCase, phase: Phase) -> Iterator[str]:
    """What leaves more room, in the phase where it was missing."""
    if double_start(case):
        yield START_ONCE
    if phase != "weights":
        yield from lower_ratio(case)
    if phase in ("weights", "unknown"):
        loading = "if it was still loading weights: " if phase == "unknown" else ""
        yield f"{loading}more GPUs (--tp), a quantised variant, or freer cards"
    if phase in ("warm-up", "text"):
        yield "lower --max-prefill-token-num: a forward's tensors grow with it"


def stack_names(facts: LogFacts, mark: LogEvent) -> list[str]:
    """The stack after a fault, innermost first, without what only checks."""
    at = facts.marks.index(mark)
    names = []
    for later in facts.marks[at + 1 :]:
        if isinstance(later.event, Frame):
            names.append(later.event.name)
        elif names:
            break
    return [name for name in names if not name.startswith("TM_")]


def phase_of_fault(facts: LogFacts, frames: list[str]) -> Phase:
    """The phase in which TurboMind died, as `serve` says it of the same log."""
    images = facts.first(VisionSetup) is not None
    phase = phase_of_death(facts.course.reached, frames, images=images)
    return "unknown" if phase == "starting" else phase


def _page_locked(mark: LogEvent, phase: Phase, frames: list[str], *, certain: bool) -> RuleAnswer:
    """The same words as for a GPU, from the call that asks the host; of that release alone."""
    what = f"LMDeploy got no page-locked host memory {when(phase, *frames[:1])} and aborted"
    why = (
        "the line of its source asks for host memory (cudaHostAlloc): the words are those of a full"
        " GPU, but no GPU was full"
    )
    return RuleAnswer(
        kind=diagnosed("host_memory"),
        phase="host RAM",
        what=what if certain else "",
        line=mark.line,
        why=(why,) if certain else (),
        possible=(
            "RAM, or a container's limit, that was full: the line of the source asks for"
            f" page-locked host memory in LMDeploy {REFERENCE}",
            "GPU memory that was full: the same line of another release",
        ),
        missing=_NOT_PRINTED,
        unknown=("why the host gave none: RAM, a container's limit, or the driver",),
        evidence=(evidence(mark, "the abort, in the allocator of page-locked memory"),),
        changes=(
            "free RAM or raise the container's memory limit; fewer replicas: each rank has such"
            " buffers",
        ),
        planned=True,
    )


def _by_the_account(
    case: LogCase, cache: LoggedCache | None, phase: Phase
) -> tuple[list[str], list[str], Missing | None]:
    """What turbofit forecasts of these settings: reasons, what is unknown, what lacks in all.

    What was free for the cache is the log's: it counts whatever else was on the card.
    """
    if cache is not None:
        note = "for all that these settings let in"
        forecast = case.forecast(free_at_cache=cache.free, cache_max_entry_count=cache.ratio)
    elif phase == "weights":
        note, forecast = "for the whole load", case.forecast()
    else:
        return [], [_NO_FREE], None
    if forecast is None:
        return [], [], None
    loads = [gpu.load_peak if cache is None else gpu.peak for gpu in forecast.gpus]
    rooms = [gpu.total - gpu.reserved for gpu in forecast.gpus]
    short = max(load - room for load, room in zip(loads, rooms, strict=True))
    assumed = [] if case.facts.subject.version else [f"assumed LMDeploy {REFERENCE}"]
    if short <= 0:
        return [], [*assumed, _ENOUGH], None
    in_all = Missing(bytes=short, basis="formula", note=f"{note}, by the account")
    return [f"by turbofit's account: {forecast.verdict}"], assumed, in_all


def _phase_by_frames(facts: LogFacts, mark: LogEvent) -> Phase:
    """By the Python stack, else by the file that allocates and the cache that was printed."""
    for frame in reversed(mark.stack):
        name = f"{frame.path} {frame.function}"
        if any(word in name for word in _VISION_WORDS):
            return "vision"
        if any(word in frame.function for word in _LOAD_WORDS):
            return "weights"
    if not any(made.line < mark.line for made, _ in facts.every(KvBlocks)):
        # Weights are allocated in memory_utils.cu, all else through the allocator.
        return "weights" if "memory_utils" in mark.text else "unknown"
    return "serving"
