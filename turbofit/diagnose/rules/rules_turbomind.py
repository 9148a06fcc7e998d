"""TurboMind of any release: out of memory, on a card or of page-locked memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.units import format_bytes
from turbofit.core.version import REFERENCE
from turbofit.diagnose.answer import Holding, Missing
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.logged_cache import (
    START_ONCE,
    cache_facts,
    double_start,
    logged_cache,
    lower_ratio,
)
from turbofit.diagnose.rules.shortage import Shortage, shortage_of
from turbofit.machine.nvidia_smi import SmiProcess
from turbofit.memory import versions
from turbofit.observe.engine_end import diagnosed, told_kind
from turbofit.observe.log_events import (
    CudaError,
    Frame,
    KvBlocks,
    LegacyCuda,
    VisionSetup,
    WarmupLength,
)
from turbofit.observe.stages import out_of_memory, phase_of_death, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.struct import Struct
    from turbofit.diagnose.answer import Evidence
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.facts import LogFacts
    from turbofit.observe.stages import Phase

#: The generations that pin much host memory.
_PINNING: Final = ("0.16", "0.17")
_NOT_PRINTED: Final = Missing(
    bytes=None, basis="unknown", note="TurboMind does not print what it asked"
)
#: What a phase of an older engine is called by, in the frames of Python around it.
_VISION_WORDS: Final = ("vl/engine", "vl/model", "vision", "intern_vit", "visual")
_LOAD_WORDS: Final = ("process_weight", "load_weight", "create_shared_weights", "export", "load")


def turbomind_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """The first lack of memory that TurboMind itself tells of."""
    for mark in case.facts.marks:
        event = mark.event
        if isinstance(event, LegacyCuda) and event.out_of_memory:
            yield _of_older(case, mark, event)
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
    if phase == "weights":
        return _while_loading(case, mark, what)
    return _after_sizing(case, mark, phase, what)


def _known(version: str | None) -> bool:
    """Whether a release's account has what it prints and takes after its cache."""
    return version is None or not versions.is_legacy(version)


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


def _while_loading(case: LogCase, mark: LogEvent, what: str) -> RuleAnswer:
    """No line tells sizes yet: what is missing follows from the account of model and card."""
    missing_in_all, why = None, []
    forecast = case.forecast()
    if forecast is not None:
        tightest = min(forecast.gpus, key=lambda gpu: gpu.total - gpu.reserved - gpu.load_peak)
        short = tightest.load_peak - (tightest.total - tightest.reserved)
        weights = sum(term.bytes for term in tightest.ledger if term.phase == "weights")
        why.append(
            f"loading peaks at {format_bytes(tightest.load_peak)} on GPU {tightest.index}"
            f" ({format_bytes(weights)} weights), and the card has"
            f" {format_bytes(tightest.total - tightest.reserved)}"
        )
        if short > 0:
            missing_in_all = Missing(
                bytes=short, basis="formula", note="for the whole load, by the account"
            )
        else:
            why.append(
                f"on an empty card {format_bytes(-short)} would stay free: the log does not say"
                " what took it (other programs, other settings, an older LMDeploy)"
            )
    return RuleAnswer(
        kind="out_of_memory",
        phase="weights",
        what=what,
        line=mark.line,
        why=tuple(why),
        held=table_holders(case),
        missing=_NOT_PRINTED,
        missing_in_all=missing_in_all,
        unknown=("how much the failing allocation asked for: the log has no line about it",),
        evidence=(evidence(mark, "the abort; no cache was sized before it"),),
        changes=(
            "more GPUs (--tp), a quantised variant, or freer cards; the cache ratio does not help",
        ),
        planned=True,
    )


def _after_sizing(case: LogCase, mark: LogEvent, phase: Phase, what: str) -> RuleAnswer:
    version, cache = case.facts.subject.version, logged_cache(case)
    shortage: Shortage | None = None
    if case.model is not None and _known(version):
        shortage = shortage_of(case.facts, case.model, case.gpu, case.turbomind)
    why = [*cache.story(case.tp or 1)] if cache else []
    unknown, in_all = _missing(case, shortage)
    if phase == "unknown":
        unknown.insert(0, "how far it had come: the log begins later than the engine")
    if not _known(version):
        oldest = versions.FIRST_CURRENT
        unknown = [f"how much LMDeploy {version} lacked: turbofit computes it from {oldest} on"]
    elif shortage is not None:
        unknown += _whose_account(case)
    why += _reasons(version, shortage)
    if shortage and shortage.surprise:
        unknown.append(shortage.surprise)
    lines = cache.lines if cache else ()
    return RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=what,
        line=mark.line,
        why=tuple(why),
        held=(*table_holders(case), *(cache.holders() if cache else ())),
        missing=_NOT_PRINTED,
        missing_in_all=in_all,
        unknown=tuple(unknown),
        evidence=(*lines, evidence(mark, "the abort"), *_under_way(case.facts, phase)),
        changes=_changes(phase, shortage),
        planned=True,
    )


def _reasons(version: str | None, shortage: Shortage | None) -> Iterator[str]:
    """What the release is known for, and what the account says of the step that failed."""
    if version is not None and version.startswith(_PINNING):
        yield (
            f"LMDeploy {version} pins 18.7 GiB of host memory a rank for InternVL, and dies of the"
            " same words when that is what it lacks"
        )
    if shortage and shortage.step:
        yield (
            f"by the account, {shortage.step} needed {format_bytes(shortage.needed)} where"
            f" {format_bytes(shortage.room)} were left"
        )


def _whose_account(case: LogCase) -> Iterator[str]:
    """That the account is another version's than the log's, or perhaps is."""
    if case.turbomind.doubt:
        yield f"how much it lacked exactly: {case.turbomind.doubt.partition(':')[0]}"
    elif case.facts.subject.version is None:
        yield f"assumed LMDeploy {REFERENCE}"


def _missing(case: LogCase, shortage: Shortage | None) -> tuple[list[str], Missing | None]:
    if case.model is None:
        return ["which model it was: name it with --model"], None
    if shortage is None:
        note = "what was free: the line `Object cache budget` comes with TM_LOG_LEVEL=INFO"
        return [note], None
    unknown = [f"assumed {assumption}" for assumption in shortage.assumed]
    if case.gpu is None:
        unknown.append("which card it was: name it with --on")
    if not shortage.step:
        return unknown, None
    in_all = Missing(
        bytes=shortage.lacked,
        basis="formula",
        note="until the warm-up passes" if "warm-up" in shortage.step else f"for {shortage.step}",
        doubt=shortage.doubt,
    )
    return unknown, in_all


def _under_way(facts: LogFacts, phase: Phase) -> list[Evidence]:
    kinds: dict[Phase, tuple[type[Struct], str]] = {
        "warm-up": (WarmupLength, "tokens of the warm-up request under way"),
        "vision": (VisionSetup, "images of the forward under way"),
    }
    kind, tells = kinds.get(phase, (None, ""))
    return [evidence(mark, tells) for mark, _ in facts.every(kind)[-1:]] if kind else []


def table_holders(case: LogCase) -> tuple[Holding, ...]:
    return tuple(
        Holding(
            who=f"{event.name}[{event.pid}]", bytes=event.used, gpu=event.gpu, lines=(mark.line,)
        )
        for mark, event in case.facts.every(SmiProcess)
    )


def _changes(phase: Phase, shortage: Shortage | None) -> tuple[str, ...]:
    changes = ["lower --cache-max-entry-count: it leaves more for what comes after the cache"]
    if shortage and shortage.step and shortage.left:
        most = shortage.lacked + shortage.doubt
        changes[0] += f" (by {format_bytes(most)} of cache at least;"
        changes[0] += f" {format_bytes(shortage.left)} were left)"
    if phase == "vision":
        changes.append("limit images: --max-dynamic-patch or --max-pixels of `turbofit serve`")
    if phase == "unknown":
        changes.append("if it was still loading weights: more GPUs (--tp) or a quantised variant")
    if phase in ("warm-up", "text"):
        changes.append("lower --max-prefill-token-num: a forward's tensors grow with it")
    return tuple(changes)


def _of_older(case: LogCase, mark: LogEvent, event: LegacyCuda) -> RuleAnswer:
    """TurboMind of 0.2 to 0.13, which prints no sizes and may have been started too often."""
    cache, twice = logged_cache(case), double_start(case)
    phase = _phase_by_frames(case.facts, mark)
    why, holdings, lines = cache_facts(case, cache)
    unknown = ["how much the failing allocation asked for: this LMDeploy does not print it"]
    if cache is not None and cache.assumed:
        unknown.append(f"the cache ratio: {cache.ratio:g} is LMDeploy's default")
    changes = [START_ONCE] if twice else []
    changes += () if phase == "weights" else lower_ratio(case)
    if phase in ("weights", "unknown"):
        loading = "if it was still loading weights: " if phase == "unknown" else ""
        changes.append(f"{loading}more GPUs (--tp), a quantised variant, or freer cards")
    lines.append(evidence(mark, "TurboMind's own out-of-memory error"))
    said = out_of_memory("TurboMind", phase, event.where)
    return RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=said.replace(when("serving"), "after its cache was made"),
        line=mark.line,
        why=tuple(why),
        held=tuple(holdings),
        missing=Missing(bytes=None, basis="unknown", note="this LMDeploy prints no sizes"),
        unknown=tuple(unknown),
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        changes=tuple(changes),
        planned=True,
        others=cache.others if cache and not twice else 0,
    )


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
