"""Answers a line that reports a lack of GPU memory, by `death`, the account and torch's figures.

`lack_of_memory` makes the answer; each function below it adds one part.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, cast

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.units import GIB, format_bytes
from turbofit.core.version import REFERENCE
from turbofit.logs.account import Finding, found, logged_cache
from turbofit.logs.answer import Draft, Evidence, Holding, Missing, evidence
from turbofit.logs.case import DEGREES
from turbofit.logs.causes import less_memory, text_of
from turbofit.logs.death import IN_DIAGNOSIS, Course, death
from turbofit.logs.log_events import ModelLoaded, NoCache
from turbofit.machine.torch_memory import TorchMemory
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from turbofit.core.engine_end import End, Phase
    from turbofit.core.model import Model
    from turbofit.logs.case import LogCase
    from turbofit.logs.facts import LogEvent

#: Bytes of other processes are reported only if they are more than this size.
_SMALL: Final = GIB // 4
#: The size in bytes that a tensor of a forward rarely exceeds.
_ONE_TENSOR: Final = 4 * GIB
#: From this size on, neither rounding nor torch's cache explains the bytes that a process held
#: beyond one copy of a model.
_BEYOND: Final = GIB
#: Once a cache exists, torch beside TurboMind holds less than this part of a card.
_MOST: Final = 0.9
#: The number of figures in torch's whole line: asked bytes, the card's size, free bytes.
_WHOLE_LINE: Final = 3
#: Calls that store the whole attention matrix (the last call only without a fused kernel).
_EAGER: Final = ("matmul", "softmax", "bmm", "baddbmm", "scaled_dot_product_attention")
#: Phases without attention over a long sequence.
_NO_ATTENTION: Final = ("cache", "quantising")
#: A card with room for any model: the account of a plan on this card has the bytes of one copy.
_LARGE_CARD: Final = "1xh200:total=1000GiB"
#: Files of notebooks: Colab's and Kaggle's folders, and the cells of IPython.
_NOTEBOOK: Final = re.compile(r"^/content/|^/kaggle/|ipykernel|<ipython-input")
_MOVES: Final = re.compile(r"\.(?:to|cuda)\(")
_MODULE: Final = re.compile(r"[/\\]torch[/\\]nn[/\\]modules[/\\]module\.py$")
#: Frames of a training: its gradients, or the step of an optimiser.
_TRAINS: Final = re.compile(
    r"\bbackward\(|\boptimizer\w*\.step\(|[/\\](?:trainer|autograd)\b|_inner_training_loop"
    r"|\btraining_step\b"
)
#: A sign of a cause: a sentence; the step against the cause, or ""; the line with the sign.
_Sign = tuple[str, str, "Evidence | None"]


def lack_of_memory(case: LogCase, mark: LogEvent) -> Draft:
    """Return the answer to a line that reports a lack of GPU memory.

    The line may also report a lack of host memory, which gets an answer without a plan. For GPU
    memory `death` is asked twice: with the log alone, then with the phase that the account shows.
    """
    course, known = Course(case.facts.until(mark)), (case.engine, case.settings)
    memory = mark.event if isinstance(mark.event, TorchMemory) else None
    end, finding = death(course, known=known), Finding()
    if end.kind == "host_memory":
        return _of_host_memory(case, mark, end)
    if case.subject.trains or _in_training(mark):
        return _of_training(mark, memory)
    if not case.subject.quantises:
        past = course.stage not in ("starting", "weights")
        finding = found(case, _phase(end), memory, cached=past)
        end = death(course, account=finding.end, known=known)
    program, phase = _program(case, memory), _phase(end)
    if case.subject.quantises:
        phase = "quantising"
    elif phase == "unknown" and program == "lmdeploy" and _all_of_torch(case, memory):
        phase = "weights"
    unsized = isinstance(mark.event, NoCache)
    draft = Draft(
        kind="out_of_memory",
        phase=phase,
        what="; ".join(filter(None, (finding.contradiction, end.message))),
        line=mark.line,
        why=finding.why,
        missing=None if unsized else _missing(memory),
        missing_in_all=finding.short,
        unknown=finding.unknown,
        evidence=(evidence(mark, "torch's own figures" if memory else "the engine's own error"),),
        changes=_general_steps(case, program, phase, finding, unsized=unsized),
        planned=not case.subject.quantises and not finding.contradiction,
        by_others=finding.others,
        short=True,
        unsized=unsized,
        free=text_of("free cards") if finding.others else "",
        emptied=bool(finding.others),
        contradicts=bool(finding.contradiction),
    )
    if memory is not None:
        draft = _with_torch(case, mark, memory, draft, program)
    return _with_ranks(case, _with_cache(case, draft, finding.weights))


def lack_in_words(case: LogCase, mark: LogEvent) -> Draft:
    """Return the answer to words that tell of a lack of GPU memory; no line shows its phase."""
    return Draft(
        kind="out_of_memory",
        what="the GPU memory ran out, by words of this text; no line of a program shows where",
        line=mark.line,
        rank="consequence",
        evidence=(evidence(mark, "the words that tell of it"),),
        changes=less_memory(_program(case, None), "unknown"),
        planned=True,
        short=True,
    )


def _of_host_memory(case: LogCase, mark: LogEvent, end: End) -> Draft:
    """Return the answer to a lack of page-locked host memory, which has no plan."""
    certain = case.subject.version is not None and case.engine.doubt is None
    return Draft(
        kind=IN_DIAGNOSIS["host_memory"],
        phase="host RAM",
        what=f"{end.message}; no GPU was full" if certain else "",
        line=mark.line,
        possible=(
            "full RAM, or a full container: in LMDeploy"
            f" {REFERENCE} this line of the source asks for page-locked host memory",
            "full GPU memory: the same line of another release asks for it",
        ),
        evidence=(evidence(mark, "the abort, in the allocator of page-locked memory"),),
        changes=(
            "free RAM or raise the container's memory limit; fewer replicas: each rank has"
            " page-locked buffers",
        ),
    )


def _of_training(mark: LogEvent, memory: TorchMemory | None) -> Draft:
    """Return the answer to a training, whose memory turbofit does not count."""
    return Draft(
        kind="out_of_memory",
        what=text_of("training"),
        line=mark.line,
        missing=_missing(memory),
        evidence=(evidence(mark, "the training's own error"),),
        changes=(text_of("train smaller"),),
    )


def _in_training(mark: LogEvent) -> bool:
    return any(_TRAINS.search(f"{call.path} {call.function} {call.code}") for call in mark.stack)


def _general_steps(
    case: LogCase, program: str, phase: Phase, finding: Finding, *, unsized: bool
) -> tuple[str, ...]:
    """Return the steps against a lack of memory that belong to a program and a phase.

    If the cache had a tiny share of the free memory, and no line shows the phase, the weights are
    what is too large.
    """
    lacks = "weights" if case.tiny_share and phase == "unknown" else phase
    steps = less_memory(program, "no cache" if unsized else lacks)
    return (text_of("contradicted"), *steps) if finding.contradiction else steps


def _phase(end: End) -> Phase:
    """Return the phase of an end; ``unknown`` for a start, whose lines do not show the phase."""
    silent = end.phase in ("", "starting", "start")
    return cast("Phase", "unknown" if silent else end.phase)


def _program(case: LogCase, memory: TorchMemory | None) -> str:
    """Return the program whose steps help: a key of `out_of_memory` in `presets/causes.yaml`."""
    if case.subject.quantises:
        return "lmdeploy-lite"
    if memory is None and case.on_jetson:
        return "jetson"
    # In a log of LMDeploy torch's text is LMDeploy's own: TurboMind's server uses torch, too.
    if not case.subject.of_lmdeploy:
        return "other"
    return "lmdeploy-pytorch" if case.subject.on_pytorch else "lmdeploy"


def _with_cache(case: LogCase, draft: Draft, weights: int) -> Draft:
    """Add the lines about the cache to an answer, and the bytes of a card that each holder took."""
    if (cache := logged_cache(case)) is None:
        return draft
    lines = tuple(evidence(place, "what the cache took") for place in cache.lines)
    held = (
        Holding(who="the KV cache", bytes=cache.size, lines=tuple(line.line for line in lines)),
        Holding(who="this model's weights, on each card", bytes=weights),
        Holding(who="others, or copies of this engine", bytes=draft.by_others),
    )
    return _adding(draft, evidence=lines, held=[holding for holding in held if holding.bytes])


def _adding(draft: Draft, **parts: Iterable[Any]) -> Draft:
    """Return an answer with further sentences, lines or holders, each behind the answer's own."""
    longer: dict[str, Any] = {name: (*getattr(draft, name), *new) for name, new in parts.items()}
    return replace(draft, **longer)


def _with_ranks(case: LogCase, draft: Draft) -> Draft:
    """Change an answer if a launcher such as torchrun started a whole engine for each rank."""
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
        evidence=(*draft.evidence, evidence(place, f"{count} processes of one program")),
        changes=(text_of("start once"), *draft.changes),
        by_others=0,
        short=False,
        free="",
        emptied=True,
    )


def _with_torch(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, program: str
) -> Draft:
    """Add torch's own figures to an answer: the holders of the card, and the steps that follow."""
    own = program == "other"
    if memory.pid and not own and any(size > (memory.process or 0) for _, size in memory.others):
        # LMDeploy also allocates outside torch, so the larger process may be LMDeploy itself.
        memory = replace(memory, named=False)
    signs = _signs(case, mark, memory, draft, own)
    others = sum(size for _, size in memory.others)
    # A bare message has no traceback and not all figures: the user should send its whole line.
    by_others, bare = others + memory.unexplained, not mark.stack and memory.figures < _WHOLE_LINE
    seen = by_others if memory.named and by_others > _SMALL else 0
    draft = _adding(
        replace(draft, free=_freed(memory, others) or draft.free),
        why=[why for why, _, _ in signs],
        unknown=[] if memory.named else [text_of("which process")],
        evidence=[line for _, _, line in signs if line],
        send=[text_of("whole line")] if bare else [],
    )
    return replace(
        draft,
        held=(*_holders(mark, memory), *draft.held),
        changes=_in_order([step for _, step, _ in signs], memory, draft, program),
        by_others=max(draft.by_others, seen),
        emptied=draft.free == text_of("free cards"),
        all_own=memory.process is not None and max(others, memory.unexplained) <= _SMALL,
    )


def _signs(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, own: bool
) -> list[_Sign]:
    """Return all signs of causes. ``own``: the log is of a program of its own, not of LMDeploy."""
    model = case.model if own else None
    split = model is not None and draft.loading and model.weight_bytes > (memory.total or math.inf)
    signs = [*_copies(case, mark, split=split), *_of_use(case, mark, memory, draft, own)]
    signs += [*_of_load(case, memory, draft, own), *_of_degree(case, draft)]
    if own and model is None:
        return [*signs, *_of_notebook(mark, memory)]
    return signs if model is None else [*signs, *_beyond(model, memory, split=split)]


def _in_order(steps: list[str], memory: TorchMemory, draft: Draft, program: str) -> tuple[str, ...]:
    """Return the steps against the causes, then general steps; the step for fragmentation is last.

    A single allocation that is larger than the card has steps of its own.
    """
    if draft.phase != "weights" and (memory.requested or 0) > (memory.total or math.inf):
        return (
            *(step for step in steps if step == text_of("fused")),
            *less_memory(program, "oversized"),
        )
    steps = [*filter(None, steps), *draft.changes]
    return tuple(sorted(steps, key=lambda step: step == text_of("segments")))


def _freed(memory: TorchMemory, others: int) -> str:
    """Return the step that frees the memory of other processes; empty if torch shows no others.

    ``others``: the bytes that other processes held by torch's figures.
    """
    if others <= _SMALL:
        return text_of("free cards") if memory.unexplained > GIB else ""
    pids = ", ".join(str(pid) for pid, _ in memory.others)
    return (
        f"end what else holds the card (process {pids}) if it is no part of this server, or plan"
        " for the free memory"
    )


def _of_use(
    case: LogCase, mark: LogEvent, memory: TorchMemory, draft: Draft, own: bool
) -> Iterator[_Sign]:
    """Yield the signs of a stored attention matrix and of fragmented memory."""
    eager = bool(mark.stack) and any(call in mark.stack[-1].code for call in _EAGER)
    large = (memory.requested or 0) > max(memory.allocated or 0, _ONE_TENSOR)
    if (large and draft.phase not in _NO_ATTENTION) or (draft.phase == "vision" and eager):
        fused = any("scaled_dot_product_attention" in frame.code for frame in mark.stack)
        yield (
            "it asked for attention's whole matrix, by the call or by the size, which grows with"
            " the square of the tokens or patches"
            f"{'; a fused attn_implementation has none' if own else ''}",
            text_of("fused") if own and not fused else "",
            None,
        )
    if memory.requested and (memory.cached or 0) >= memory.requested:
        # Under WSL and Windows torch prints no process, and users report that the option fails.
        able = memory.process is not None and "expandable" not in case.subject.facts
        yield (
            f"{format_bytes(memory.cached or 0)} lay unused in torch's own cache, in pieces too"
            " small or of another size: fragmentation",
            text_of("segments") if able else "",
            None,
        )


def _of_load(case: LogCase, memory: TorchMemory, draft: Draft, own: bool) -> Iterator[_Sign]:
    """Yield the signs that the cards had no room for weights that fit on empty cards."""
    model, total = case.model, memory.total or 0
    place, small = case.subject.offloaded, model and model.weight_bytes < _MOST * total
    sized = f"{model.name} is {format_bytes(model.weight_bytes)} of weights" if model else ""
    if place is not None and (small or not model):
        full = "the card was not free when the weights came"
        full += f": {sized}" if model else ", unless it is smaller than the model"
        why = "accelerate put weights into host memory, as it does where the cards have no room"
        yield f"{why}: {full}", text_of("free cards"), evidence(place, "weights were offloaded")
    elif own and small and draft.loading and memory.process is None and not memory.others:
        held = "something else held it, or the model was loaded more than once"
        yield (
            f"{sized}, and the card has {format_bytes(total)}: {held}",
            text_of("free cards"),
            None,
        )


def _of_degree(case: LogCase, draft: Draft) -> Iterator[_Sign]:
    """Yield a sign if the run used fewer cards than are visible, and may have died loading."""
    if not draft.loading or case.has_account or not case.subject.of_lmdeploy:
        return
    visible = len(case.machine.gpus) if case.machine else case.subject.visible or 1
    larger = [degree for degree in DEGREES if case.tp < degree <= visible]
    if larger:
        tp = larger[0]
        why = f"{visible} cards are visible, and this run took {case.tp}"
        yield why, f"--tp {tp}: {why}", None


def _of_notebook(mark: LogEvent, memory: TorchMemory) -> Iterator[_Sign]:
    """Yield a sign if a notebook's process filled a card, with a model that no line names."""
    path = next((frame.path for frame in mark.stack if _NOTEBOOK.search(frame.path)), "")
    if path and (memory.process or 0) > _MOST * (memory.total or math.inf):
        yield (
            f"{path} is of a notebook, and its process held {format_bytes(memory.process or 0)},"
            " nearly all of the card: a model of an earlier cell may still be in it",
            text_of("restart"),
            None,
        )


def _all_of_torch(case: LogCase, memory: TorchMemory | None) -> bool:
    """Return whether torch fills a card beside TurboMind, whose cache is outside of torch."""
    allocated, total = (memory.allocated or 0, memory.total) if memory else (0, None)
    return bool(total) and not case.subject.on_pytorch and allocated > _MOST * (total or 0)


def _copies(case: LogCase, mark: LogEvent, *, split: bool) -> Iterator[_Sign]:
    """Yield the signs that a program holds a model more than once: its loads and its calls."""
    placed, ranks = case.subject.auto_map, case.subject.ranks
    once = text_of("split") if split else text_of("load once")
    moves = [frame.code for frame in mark.stack if _MOVES.search(frame.code)]
    if placed and moves and any(_MODULE.search(frame.path) for frame in mark.stack):
        yield (
            f'device_map="auto" had placed the model over the cards, and `{moves[0].strip()}` moves'
            " the whole of it onto one",
            once,
            evidence(placed, "the model is placed"),
        )
    # Two progress bars in neighbouring lines belong to one load.
    loads = [made for made, _ in case.facts.every(ModelLoaded)]
    again = [now for before, now in pairwise(loads) if now.line - before.line > 1]
    if again and len(again) + 1 > (ranks[0] if ranks else 1):
        shards = ", and `device_map=auto` shards each over the same cards" if placed else ""
        yield (
            f"the program loaded the whole model {len(again) + 1} times{shards}: replicas, or"
            " replicas and shards at once, so every copy after the first meets cards that are"
            " already full",
            once,
            evidence(again[0], "the model is loaded again"),
        )


def _beyond(model: Model, memory: TorchMemory, *, split: bool) -> Iterator[_Sign]:
    """Yield signs that a card cannot hold a copy of the model, or that a process held too much.

    Too much is more than one copy of the model takes with its longest request.
    """
    if split:
        yield (
            f"a whole copy of {model.name} is {format_bytes(model.weight_bytes)} of weights as"
            f" published, and GPU {memory.gpu} has {format_bytes(memory.total or 0)}: a copy on"
            " each card cannot be, one that is split over the cards can",
            text_of("split"),
            None,
        )
    held, weights = memory.allocated or memory.process or 0, model.weight_bytes
    if held < weights:
        return
    with suppress(TurbofitError):
        alone = plan(PlanRequest.of(model=model, on=_LARGE_CARD, engine="transformers"))
        most = max(gpu.peak for gpu in alone.ledgers)
        if held - most >= _BEYOND:
            yield (
                f"{model.name} has {format_bytes(weights)} of weights, and with its longest request"
                f" it takes at most {format_bytes(most)}: {format_bytes(held - most)} of what this"
                " process held are beyond that. Either the model is in this process a second time,"
                " whole or in part, as after a notebook cell that ran twice, or its weights were"
                " loaded in 32 bits (no torch_dtype), or requests were computed together",
                text_of("restart"),
                None,
            )


def _missing(memory: TorchMemory | None) -> Missing:
    """Return the missing bytes: the requested bytes less the free bytes, or unknown.

    torch rounds each of its figures to hundredths of a unit.
    """
    if memory is None or memory.missing is None:
        silent = "the text does not say it" if memory else "TurboMind does not print what it asked"
        return Missing(bytes=None, basis="unknown", note=silent)
    asked, free = (format_bytes(size or 0) for size in (memory.requested, memory.free))
    return Missing(bytes=memory.missing, basis="log", note=f"asked {asked}, free {free}")


def _holders(mark: LogEvent, memory: TorchMemory) -> Iterator[Holding]:
    """Yield each process that torch's text names, with its bytes on the GPU."""
    this = "this process" if memory.pid is None else f"process {memory.pid}"
    if memory.pid is not None and memory.named:
        this = f"this process ({this} of the text)"
    named = ((this, memory.process), *((f"process {pid}", size) for pid, size in memory.others))
    for who, size in named:
        if size is not None:
            yield Holding(who=who, bytes=size, gpu=memory.gpu, lines=(mark.line,))
