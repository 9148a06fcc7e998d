"""The answer to a lack of memory: `death` of the log's events, with what the account says of it."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, cast

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

    from turbofit.core.engine_end import End
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
_FREE: Final = "free the cards first: `turbofit doctor` and nvidia-smi name what holds them"
_LOOK: Final = (
    "see with nvidia-smi or `turbofit doctor` what else holds the cards: by the account these"
    " settings alone do not explain it"
)
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
_SEGMENTS: Final = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation"
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
    end, program, finding = death(course, known=known), _program(case, mark), Finding()
    if end.kind == "host_memory":
        certain = case.subject.version is not None and case.engine.doubt is None
        return Draft(
            kind=IN_DIAGNOSIS["host_memory"],
            phase="host RAM",
            what=f"{end.message}; no GPU was full" if certain else "",
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
    phase: Phase = "quantising" if program == "lmdeploy-lite" else _phase(end)
    if program != "lmdeploy-lite":
        cached = course.stage not in ("starting", "weights")
        finding = found(case, phase, memory, cached=cached)
    if finding.end is not None:
        end = death(course, account=finding.end, known=known)
        phase = _phase(end)
    what = end.message
    if isinstance(mark.event, CudaError | PythonError) and "Triton" not in what:
        what = what.replace("the program", "the engine")
    note = "for all that these settings let in, by the account"
    draft = Draft(
        kind="out_of_memory",
        phase=phase,
        what=what,
        line=mark.line,
        why=finding.why,
        missing=_missing(memory),
        missing_in_all=Missing(bytes=finding.short, basis="formula", note=note)
        if finding.short
        else None,
        unknown=finding.unknown,
        evidence=(evidence(mark, "torch's own figures" if memory else "the engine's own error"),),
        changes=less_memory(program, phase),
        planned=program != "lmdeploy-lite",
        by_others=finding.others,
        short=True,
        free=_FREE if finding.others else _LOOK if finding.occupied else "",
    )
    if memory is not None:
        draft = _with_torch(case, mark, memory, draft, program)
    return _with_ranks(case, _with_cache(case, draft, finding.weights))


def _phase(end: End) -> Phase:
    told = cast("Phase", end.phase or "unknown")
    return "unknown" if told in ("starting", "start") else told


def _program(case: LogCase, mark: LogEvent) -> str:
    """The program that ran out of memory, by its name in the table of less memory."""
    if case.subject.quantises:
        return "lmdeploy-lite"
    if isinstance(mark.event, TorchMemory) and not case.subject.of_lmdeploy:
        return "other"
    # TurboMind computes without torch, so torch's allocations belong to LMDeploy's front end.
    return "lmdeploy-pytorch" if case.subject.on_pytorch else "lmdeploy"


def _with_cache(case: LogCase, draft: Draft, weights: int) -> Draft:
    """The answer with the lines about the cache, and who held the card when it was sized."""
    if (cache := logged_cache(case)) is None:
        return draft
    tells: tuple[str, ...] = ("free memory, and what the cache took of it",)
    if cache.blocks:
        tokens = case.engine.defaults("").get("cache_block_seq_len", 64)
        tells = (f"bytes of one KV block ({tokens} tokens, all layers)", "how many the cache has")
    lines = tuple(evidence_at(*pair) for pair in zip(cache.lines, tells, strict=True))
    held = (
        Holding(who="the KV cache", bytes=cache.size, lines=tuple(one.line for one in lines)),
        Holding(who="this model's weights, on each card", bytes=weights),
        Holding(who="others, or copies of this engine", bytes=draft.by_others),
    )
    known = tuple(one for one in held if one.bytes)
    return replace(draft, evidence=(*draft.evidence, *lines), held=(*draft.held, *known))


def _with_ranks(case: LogCase, draft: Draft) -> Draft:
    """The answer where a launcher started an engine for each rank."""
    ranks = case.subject.ranks
    if ranks is None or case.tp < 2 or not case.subject.of_lmdeploy:
        return draft
    count, place = ranks
    why = (
        f"a rank launcher started the program {count} times, and each start builds a whole engine"
        f" with tp {case.tp} on the same cards: {count} models in the place of one"
    )
    return replace(
        draft,
        why=(why, *draft.why),
        evidence=(*draft.evidence, evidence_at(place, f"{count} processes of one program")),
        changes=(_START_ONCE, *draft.changes),
        by_others=0,
        short=False,
        free="",
    )


class _Sign(NamedTuple):
    """What figures and frames show: why, the first step against it, and its line."""

    why: str
    step: str = ""
    line: Evidence | None = None


def _with_torch(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, program: str
) -> Draft:
    """The answer with torch's own figures: who held the card, and what a first step does of it."""
    own = program == "other"
    if memory.pid and not own and any(size > (memory.process or 0) for _, size in memory.others):
        # LMDeploy also allocates outside torch: torch's figures do not tell it from a larger one.
        memory = replace(memory, named=False)
    signs = [*_copies(case, mark), *_beyond(case, mark, memory, draft, own=own)]
    signs += [*_matrix(mark, memory, draft, own=own), *_of_the_card(case, memory)]
    others = sum(size for _, size in memory.others) + memory.unexplained
    free = _FREE if memory.unexplained > GIB else draft.free
    if sum(size for _, size in memory.others) > _SMALL:
        pids = ", ".join(str(pid) for pid, _ in memory.others)
        free = (
            f"end what else holds the card (process {pids}) if it is no part of this server, or"
            " plan for what is free"
        )
    bare = not mark.stack and (memory.requested is None or case.model is None)
    return replace(
        draft,
        why=(*draft.why, *(sign.why for sign in signs if sign.why)),
        held=(*_holders(mark, memory), *draft.held),
        unknown=(*draft.unknown, *_open(mark, memory, draft)),
        evidence=(*draft.evidence, *(sign.line for sign in signs if sign.line)),
        changes=_in_order([sign.step for sign in signs], memory, draft, program),
        send=(_SEND,) if bare else (),
        by_others=max(draft.by_others, others if memory.named and others > _SMALL else 0),
        free=free,
    )


def _in_order(steps: list[str], memory: TorchMemory, draft: Draft, program: str) -> tuple[str, ...]:
    """The steps of signs before those that help in general, and fragmentation's last."""
    general, last = draft.changes, [step for step in steps if step is _SEGMENTS]
    if _SPLIT in steps:  # no card holds a copy
        steps = [step for step in steps if step is not _ONCE]
    if draft.phase != "weights" and (memory.requested or 0) > (memory.total or math.inf):
        steps, last = [step for step in steps if step is _FUSED], []
        general = less_memory(program, "oversized")
    return (*(step for step in steps if step and step is not _SEGMENTS), *general, *last)


def _open(mark: LogEvent, memory: TorchMemory, draft: Draft) -> Iterator[str]:
    """Yields what torch's text leaves open."""
    if not mark.stack and draft.phase == "unknown" and not draft.unknown:
        yield "where: the log has no traceback before the error"
    if any("eager_attention_forward" in frame.function for frame in mark.stack):
        yield "whether the attention is the vision tower's or the language model's"
    if not memory.named:
        yield "which of these processes is this server: torch lists them by their pid on the host"


def _matrix(mark: LogEvent, memory: TorchMemory, draft: Draft, *, own: bool) -> Iterator[_Sign]:
    """Yields the sign of attention's whole matrix, by the call or by the size."""
    eager = bool(mark.stack) and any(call in mark.stack[-1].code for call in _EAGER)
    large = (memory.requested or 0) > max(memory.allocated or 0, _ONE_TENSOR)
    if (large and draft.phase not in _NO_ATTENTION) or (draft.phase == "vision" and eager):
        sdpa = any("scaled_dot_product_attention" in frame.code for frame in mark.stack)
        yield _Sign(
            "it asked for attention's whole matrix, by the call or by the size, which grows with"
            " the square of the tokens or patches"
            f"{'; a fused attn_implementation has none' if own else ''}",
            _FUSED if own and not sdpa else "",
        )


def _of_the_card(case: LogCase, memory: TorchMemory) -> Iterator[_Sign]:
    """Yields what torch holds without use, and what nobody in its text holds."""
    if memory.requested and (memory.cached or 0) >= memory.requested:
        # Not under WSL and Windows, which tell no process: there it is said to fail.
        able = memory.process is not None and "expandable" not in case.subject.facts
        yield _Sign(
            f"{format_bytes(memory.cached or 0)} lay unused in torch's own cache, in pieces too"
            " small or of another size: fragmentation",
            _SEGMENTS if able else "",
        )
    if memory.unexplained > GIB:
        yield _Sign(
            f"at least {format_bytes(memory.unexplained)} of the card are explained by nobody in"
            " this text: another process or container, or the driver"
        )


def _copies(case: LogCase, mark: LogEvent) -> Iterator[_Sign]:
    """Yields the signs that a program holds a model more than once: its loads and its calls."""
    placed, ranks = case.subject.auto_map, case.subject.ranks
    moves = [frame.code for frame in mark.stack if _MOVES.search(frame.code)]
    if placed and moves and any(_MODULE.search(frame.path) for frame in mark.stack):
        yield _Sign(
            f'device_map="auto" had placed the model over the cards, and `{moves[0].strip()}` moves'
            " the whole of it onto one",
            _ONCE,
            evidence_at(placed, "the model is placed"),
        )
    # A progress bar that is drawn again in the next line belongs to the same load.
    loads = [made for made, _ in case.facts.every(ModelLoaded)]
    again = [now for before, now in pairwise(loads) if now.line - before.line > 1]
    if again and len(again) + 1 > (ranks[0] if ranks else 1):
        shards = ", and `device_map=auto` shards each over the same cards" if placed else ""
        yield _Sign(
            f"the program loaded the whole model {len(again) + 1} times{shards}: replicas, or"
            " replicas and shards at once, so every copy after the first meets cards that are"
            " already full",
            _ONCE,
            evidence(again[0], "the model is loaded again"),
        )


def _beyond(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, *, own: bool
) -> Iterator[_Sign]:
    """Yields what figures show of copies: turbofit knows the most that one with a request takes."""
    if case.model is None or not own:
        return
    name, weights = case.model.name, case.model.weight_bytes
    if memory.total and weights > memory.total and draft.phase in ("weights", "unknown"):
        yield _Sign(
            f"a whole copy of {name} is {format_bytes(weights)} of weights as published, and GPU"
            f" {memory.gpu} has {format_bytes(memory.total)}: a copy on each card cannot be, one"
            " that is split over the cards can",
            _SPLIT,
        )
    held = memory.allocated or memory.process or 0
    trains = any(_TRAINS.search(f"{frame.path} {frame.code}") for frame in mark.stack)
    most = _most(case.model) if held >= weights and not trains else None
    if most is not None and held - most >= _BEYOND:
        yield _Sign(
            f"{name} has {format_bytes(weights)} of weights, and with its longest request it takes"
            f" at most {format_bytes(most)}: {format_bytes(held - most)} of what this process held"
            " are beyond that. Either the model is in this process a second time, whole or in part,"
            " as after a notebook cell that ran twice, or its weights were loaded in 32 bits (no"
            " torch_dtype), or requests were computed together",
            _RESTART,
        )


def _most(model: Model) -> int | None:
    """An upper bound in bytes of one copy under Transformers with its longest request."""
    try:
        told = plan(PlanRequest.of(model=model, on=_LARGE_CARD, engine="transformers"))
    except TurbofitError:
        return None
    return max(gpu.peak for gpu in told.gpus)


def _missing(memory: TorchMemory | None) -> Missing:
    """Requested minus free bytes; torch rounds both to hundredths of their unit."""
    note = "TurboMind does not print what it asked"
    if memory is not None:
        figures = {"asked": memory.requested, "free": memory.free}
        known = (
            f"{name} {format_bytes(size)}" for name, size in figures.items() if size is not None
        )
        note = ", ".join(known) or "the text has no figures"
        if memory.requested is not None and (memory.free or 0) >= memory.requested:
            note += ", more than was asked: a limit of the process, or others gave memory back"
    missing = memory.missing if memory else None
    return Missing(bytes=missing, basis="unknown" if missing is None else "log", note=note)


def _holders(mark: LogEvent, memory: TorchMemory) -> Iterator[Holding]:
    """Yields each process with its bytes, as certain as the text is."""
    this, held = "this process", memory.process
    if memory.pid is not None:
        one = f"process {memory.pid}"
        this = f"this process ({one} of the text)" if memory.named else one
    elif held is None and memory.named:
        this, held = "this process's tensors", memory.allocated
    sizes = {this: held} | {f"process {pid}": size for pid, size in memory.others}
    for who, size in sizes.items():
        if size is not None:
            yield Holding(who=who, bytes=size, gpu=memory.gpu, lines=(mark.line,))
