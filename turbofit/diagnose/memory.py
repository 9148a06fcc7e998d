"""The answer to a lack of memory: `death` of the log's events, with what the account says of it."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.units import GIB, format_bytes
from turbofit.core.version import REFERENCE
from turbofit.diagnose.account import Finding, found, logged_cache
from turbofit.diagnose.answer import Evidence, Holding, Missing
from turbofit.diagnose.causes import less_memory
from turbofit.diagnose.draft import Draft, evidence, evidence_at
from turbofit.observe.death import IN_DIAGNOSIS, Course, Phase, death
from turbofit.observe.log_events import (
    CONTEXT,
    CudaError,
    ModelLoaded,
    NoCache,
    PythonError,
    TorchMemory,
)
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.model import Model
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogEvent

#: Fewer bytes of other processes are not reported; a tensor of a forward rarely has more; bytes
#: beyond one copy of a model that are more than rounding and torch's own cache.
_SMALL, _ONE_TENSOR, _BEYOND = GIB // 4, 4 * GIB, GIB
#: Calls that store the whole attention matrix; torch's own call does so without a fused kernel.
_EAGER: Final = ("matmul", "softmax", "bmm", "baddbmm", "scaled_dot_product_attention")
#: Phases that compute no attention over a long sequence.
_NO_ATTENTION: Final = ("cache", "quantising")
#: A card that is large enough for any such model; it serves only to compute one copy's bytes.
_LARGE_CARD: Final = "1xh200:total=1000GiB"
_MOVES: Final = re.compile(r"\.(?:to|cuda)\(")
_MODULE: Final = re.compile(r"[/\\]torch[/\\]nn[/\\]modules[/\\]module\.py$")
#: Words of training, which holds more memory than an answer needs.
_TRAINS: Final = re.compile(r"\bbackward\(|optimizer|[/\\](?:trainer|autograd)\b")
_START_ONCE: Final = (
    "start the engine once (plain python, or --nproc_per_node=1), not under torchrun"
)
_ONCE: Final = (
    "load the model once; over several cards choose one: a whole model on each card, or one model"
    " sharded over them"
)
_SPLIT: Final = (
    'load the model once, and let it be split over the cards: device_map="auto" without .to() or'
    " .cuda() behind it; no card holds a copy"
)
_RESTART: Final = (
    "restart the notebook's kernel (or the program) and load the model once: a first copy, if there"
    " is one, ends with it; nvidia-smi shows what is left on the card"
)
_FUSED: Final = 'attn_implementation="sdpa" (or "flash_attention_2"): it stores no such matrix'
#: What to send if the log is only an error text.
_SEND: Final = (
    'the line "CUDA out of memory. Tried to allocate …" as a whole, whose figures say who held the'
    ' card, with the lines before it from "Traceback (most recent call last)" on'
)


def lack_of_memory(case: LogCase) -> Iterator[Draft]:
    """Yields the answer to the first line that tells of a lack of GPU memory."""
    for mark in case.facts.fatal:
        event = mark.event
        if isinstance(event, TorchMemory | NoCache) or getattr(event, "out_of_memory", False):
            yield _answer(case, mark)
            return


def _answer(case: LogCase, mark: LogEvent) -> Draft:
    course, known = Course(case.facts.until(mark)), (case.engine, case.settings)
    memory = mark.event if isinstance(mark.event, TorchMemory) else None
    end = death(course, known=known)
    if end.kind == "host_memory":
        return _page_locked(case, mark, end.message)
    program = _program(case, mark)
    phase: Phase = "quantising" if program == "lmdeploy-lite" else _phase(end.phase)
    cached = course.stage not in ("starting", "weights")
    finding = Finding() if program == "lmdeploy-lite" else found(case, phase, memory, cached=cached)
    if finding.end is not None:
        end = death(course, account=finding.end, known=known)
        phase = _phase(end.phase)
    what = end.message
    if isinstance(mark.event, CudaError | PythonError) and "Triton" not in what:
        what = what.replace("the program", "the engine")
    draft = Draft(
        kind="out_of_memory",
        phase=phase,
        what=what,
        line=mark.line,
        why=finding.why,
        missing=_missing(memory),
        unknown=finding.unknown,
        evidence=(evidence(mark, "torch's own figures" if memory else "the engine's own error"),),
        changes=less_memory(program, phase),
        planned=True,
        by_others=finding.others,
        short=True,
    )
    if finding.short:
        note = "for all that these settings let in, by the account"
        draft = replace(
            draft, missing_in_all=Missing(bytes=finding.short, basis="formula", note=note)
        )
    if memory is not None:
        draft = _with_torch(case, mark, memory, draft, program)
    return _with_ranks(case, _with_cache(case, draft, finding.weights))


def _phase(told: str) -> Phase:
    return "unknown" if told in ("", "starting", "start") else told  # type: ignore[return-value]


def _page_locked(case: LogCase, mark: LogEvent, what: str) -> Draft:
    """The same words as for a GPU, from the call that asks the host; of that release alone."""
    certain = case.subject.version is not None and case.engine.doubt is None
    return Draft(
        kind=IN_DIAGNOSIS["host_memory"],
        phase="host RAM",
        what=f"{what}; no GPU was full" if certain else "",
        line=mark.line,
        possible=(
            "RAM, or a container's limit, that was full: the line of the source asks for"
            f" page-locked host memory in LMDeploy {REFERENCE}",
            "GPU memory that was full: the same line of another release",
        ),
        evidence=(evidence(mark, "the abort, in the allocator of page-locked memory"),),
        changes=(
            "free RAM or raise the container's memory limit; fewer replicas: each rank has such"
            " buffers",
        ),
        planned=True,
    )


def _program(case: LogCase, mark: LogEvent) -> str:
    """The program that ran out of memory, by its name in the table of less memory."""
    paths = [frame.path.replace("\\", "/") for frame in mark.stack]
    for folder, name in (("lmdeploy/pytorch/", "lmdeploy-pytorch"),
                         ("lmdeploy/lite/", "lmdeploy-lite"), ("lmdeploy/", "lmdeploy")):  # fmt: skip
        if any(folder in path for path in paths):
            return name
    if case.subject.quantises:
        return "lmdeploy-lite"
    if isinstance(mark.event, TorchMemory) and not case.subject.of_lmdeploy:
        return "other"
    # TurboMind computes without torch, so torch's allocations belong to LMDeploy's front end.
    return "lmdeploy-pytorch" if case.subject.on_pytorch else "lmdeploy"


def _with_cache(case: LogCase, draft: Draft, weights: int) -> Draft:
    """The answer with the lines about the cache, and who held the card when it was sized."""
    cache = logged_cache(case)
    if cache is None:
        return draft
    tells = ("free memory, and what the cache took of it",)
    if cache.blocks:
        tokens = case.engine.defaults("").get("cache_block_seq_len", 64)
        tells = (f"bytes of one KV block ({tokens} tokens, all layers)", "how many the cache has")
    lines = tuple(evidence_at(*pair) for pair in zip(cache.lines, tells, strict=True))
    held = [Holding(who="the KV cache", bytes=cache.size, lines=tuple(one.line for one in lines))]
    if weights:
        held.append(Holding(who="this model's weights, on each card", bytes=weights))
    if draft.by_others:
        held.append(Holding(who="others, or copies of this engine", bytes=draft.by_others))
    return replace(draft, evidence=(*draft.evidence, *lines), held=(*draft.held, *held))


def _with_ranks(case: LogCase, draft: Draft) -> Draft:
    """The answer where a launcher started an engine for each rank."""
    ranks = case.subject.ranks
    if ranks is None or case.tp < 2 or not case.subject.of_lmdeploy:
        return draft
    count, place = ranks
    return replace(
        draft,
        why=(
            f"a rank launcher started the program {count} times, and each start builds a whole"
            f" engine with tp {case.tp} on the same cards: {count} models in the place of one",
            *draft.why,
        ),
        evidence=(*draft.evidence, evidence_at(place, f"{count} processes of one program")),
        changes=(_START_ONCE, *draft.changes),
        by_others=0,
        short=False,
    )


def _with_torch(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, program: str
) -> Draft:
    """The answer with torch's own figures: who held the card, and what a first step does of it."""
    eager = bool(mark.stack) and any(call in mark.stack[-1].code for call in _EAGER)
    large = (memory.requested or 0) > max(memory.allocated or 0, _ONE_TENSOR)
    whole = (draft.phase == "vision" and eager) or (large and draft.phase not in _NO_ATTENTION)
    own = program == "other"
    steps, why, lines = _copies(case, mark, memory, draft, own=own)
    if whole:
        why.append(
            "it asked for attention's whole matrix, by the call or by the size, which grows with"
            f" the square of the tokens or patches{'; a fused attn_implementation has none' if own else ''}"
        )
        sdpa = any("scaled_dot_product_attention" in frame.code for frame in mark.stack)
        steps += [_FUSED] if own and not sdpa else []
    listed = sum(size for _, size in memory.others)
    if listed > _SMALL:
        pids = ", ".join(str(pid) for pid, _ in memory.others)
        steps.append(
            f"end what else holds the card (process {pids}) if it is no part of this server, or plan"
            " for what is free"
        )
    steps += draft.changes
    if draft.phase != "weights" and (memory.requested or 0) > (memory.total or math.inf):
        steps = [*(step for step in steps if step is _FUSED), *less_memory(program, "oversized")]
    pieces = bool(memory.cached and memory.requested and memory.cached >= memory.requested)
    if pieces:
        why.append(
            f"{format_bytes(memory.cached or 0)} lay unused in torch's own cache, in pieces too"
            " small or of another size: fragmentation"
        )
        # Not under WSL and Windows, which tell no process: there it is said to fail.
        if memory.process is not None and "expandable" not in case.subject.facts:
            steps.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation")
    rest = _unexplained(memory)
    if rest > GIB:
        why.append(
            f"at least {format_bytes(rest)} of the card are explained by nobody in this text:"
            " another process or container, or the driver"
        )
    if memory.outside_torch and not any("weights of a rank" in one for one in draft.why):
        why.append(
            f"{format_bytes(memory.outside_torch)} of what this process held was allocated outside"
            " torch: CUDA's context, kernels and libraries, and what an engine that computes"
            " without torch, where one ran, allocates itself (its weights and its KV cache)"
        )
    named, unknown = _names_this(case, memory), list(draft.unknown)
    if not mark.stack and draft.phase == "unknown" and not unknown:
        unknown.append("where: the log has no traceback before the error")
    if any("eager_attention_forward" in frame.function for frame in mark.stack):
        unknown.append("whether the attention is the vision tower's or the language model's")
    if not named:
        unknown.append(
            "which of these processes is this server: torch lists them by their pid on the host"
        )
    bare = not mark.stack and memory.requested is None
    return replace(
        draft,
        why=(*draft.why, *why),
        held=(*_holders(case, mark, memory), *draft.held),
        unknown=tuple(unknown),
        evidence=(*draft.evidence, *lines),
        changes=tuple(steps),
        send=(_SEND,) if bare or (not mark.stack and case.model is None) else (),
        by_others=max(draft.by_others, listed + rest if named and listed + rest > _SMALL else 0),
    )


def _copies(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, *, own: bool
) -> tuple[list[str], list[str], list[Evidence]]:
    """First steps, reasons and lines where one program holds a model more than once.

    The signs are its loads, its traceback's source lines, and its figures: turbofit knows the most
    that one copy of a model and its longest request take; the rest is another copy's.
    """
    signs: list[tuple[str, Evidence]] = []
    placed, ranks = case.subject.auto_map, case.subject.ranks
    moves = [frame.code for frame in mark.stack if _MOVES.search(frame.code)]
    if placed and moves and any(_MODULE.search(frame.path) for frame in mark.stack):
        text = (
            f'device_map="auto" had placed the model over the cards, and `{moves[0].strip()}` moves'
            " the whole of it onto one"
        )
        signs.append((text, evidence_at(placed, "the model is placed")))
    # A progress bar that is drawn again in the next line belongs to the same load.
    loads = [made for made, _ in case.facts.every(ModelLoaded)]
    again = [now for before, now in pairwise(loads) if now.line - before.line > 1]
    if again and len(again) + 1 > (ranks[0] if ranks else 1):
        shards = ", and `device_map=auto` shards each over the same cards" if placed else ""
        text = (
            f"the program loaded the whole model {len(again) + 1} times{shards}: replicas, or"
            " replicas and shards at once, so every copy after the first meets cards that are"
            " already full"
        )
        signs.append((text, evidence(again[0], "the model is loaded again")))
    why, lines = [text for text, _ in signs], [line for _, line in signs]
    small = beyond = False
    if case.model is not None and own:
        name, weights = case.model.name, case.model.weight_bytes
        loading = draft.phase in ("weights", "unknown")
        if small := bool(memory.total and weights > memory.total and loading):
            why.append(
                f"a whole copy of {name} is {format_bytes(weights)} of weights as published, and GPU"
                f" {memory.gpu} has {format_bytes(memory.total or 0)}: a copy on each card cannot be,"
                " one that is split over the cards can"
            )
        held = memory.allocated or memory.process or 0
        trains = any(_TRAINS.search(f"{frame.path} {frame.code}") for frame in mark.stack)
        most = None if trains or held < weights else _most(case.model)
        if beyond := most is not None and held - most >= _BEYOND:
            why.append(
                f"{name} has {format_bytes(weights)} of weights, and with its longest request it"
                f" takes at most {format_bytes(most or 0)}: {format_bytes(held - (most or 0))} of"
                " what this process held are beyond that. Either the model is in this process a"
                " second time, whole or in part, as after a notebook cell that ran twice, or its"
                " weights were loaded in 32 bits (no torch_dtype), or requests were computed"
                " together"
            )
    steps = [_SPLIT if small else _ONCE] if small or signs else []
    return [*steps, *([_RESTART] if beyond else [])], why, lines


def _most(model: Model) -> int | None:
    """An upper bound in bytes of one copy under Transformers with its longest request."""
    try:
        told = plan(PlanRequest.of(model=model, on=_LARGE_CARD, engine="transformers"))
    except TurbofitError:
        return None
    return max(gpu.peak for gpu in told.gpus)


def _names_this(case: LogCase, memory: TorchMemory) -> bool:
    """Whether the text tells this process from the others on the card.

    LMDeploy also allocates outside torch: torch's figures do not tell it from a larger process.
    """
    larger = any(size > (memory.process or 0) for _, size in memory.others)
    guessed = memory.pid is not None and case.subject.of_lmdeploy and larger
    return memory.named and not guessed


def _unexplained(memory: TorchMemory) -> int:
    """Bytes of the card that no process in the text explains, without one context of this process.

    Up to torch 2.0 the process's figure does not include its context: so much of the rest counts
    as one.
    """
    if memory.total is None or memory.process is None or memory.free is None:
        return 0
    listed = sum(size for _, size in memory.others)
    rest = memory.total - memory.process - memory.free - listed
    return max(0, rest if memory.context else rest - CONTEXT)


def _missing(memory: TorchMemory | None) -> Missing:
    """Requested minus free bytes; torch rounds both to hundredths of their unit."""
    if memory is None:
        return Missing(bytes=None, basis="unknown", note="TurboMind does not print what it asked")
    if memory.missing is not None:
        requested, free = format_bytes(memory.requested or 0), format_bytes(memory.free or 0)
        return Missing(bytes=memory.missing, basis="log", note=f"asked {requested}, free {free}")
    note = "the text has not both figures"
    if memory.requested is not None:
        note = f"{note}; it asked {format_bytes(memory.requested)}"
        if memory.free is not None:
            note = (
                f"{format_bytes(memory.free)} were free, more than the"
                f" {format_bytes(memory.requested)} asked: a limit of the process, or others'"
                " memory came back meanwhile"
            )
    return Missing(bytes=None, basis="unknown", note=note)


def _holders(case: LogCase, mark: LogEvent, memory: TorchMemory) -> Iterator[Holding]:
    """Yields each process with its bytes, as certain as the text is."""
    this, held = "this process", memory.process
    if not _names_this(case, memory):
        this = f"process {memory.pid}"
    elif memory.pid is not None:
        this = f"this process (process {memory.pid} of the text)"
    elif held is None:
        this, held = "this process's tensors", memory.allocated
    sizes = {this: held} | {f"process {pid}": size for pid, size in memory.others}
    for who, size in sizes.items():
        if size is not None:
            yield Holding(who=who, bytes=size, gpu=memory.gpu, lines=(mark.line,))
