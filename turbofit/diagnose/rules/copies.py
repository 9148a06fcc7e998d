"""Finds models that one program holds more than once, and models too large for any card of a log.

The signs are the loads in a log, the source lines of its traceback, and its figures: turbofit knows
the most that one copy of a model and its longest request take; the rest is another copy's.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import TurbofitError
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.answer import Evidence
from turbofit.diagnose.rules.draft import evidence
from turbofit.observe.log_events import ModelLoaded, TorchMemory
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.model import Model
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.observe.stages import Phase

#: A card that is large enough for any such model; it serves only to compute one copy's bytes.
_LARGE_CARD: Final = "1xh200:total=1000GiB"
_MOVES: Final = re.compile(r"\.(?:to|cuda)\(")
_MODULE: Final = re.compile(r"[/\\]torch[/\\]nn[/\\]modules[/\\]module\.py$")
#: Words of training, which holds more memory than an answer needs.
_TRAINS: Final = re.compile(r"\bbackward\(|optimizer|[/\\](?:trainer|autograd)\b")
#: Bytes beyond one copy that are more than rounding and torch's own cache.
_BEYOND: Final = GIB


class Copy(NamedTuple):
    """A sign that a model is loaded once too often: its meaning, a remedy, and the log's line."""

    why: str
    change: str
    line: Evidence


def copies(case: LogCase, mark: LogEvent, memory: TorchMemory, phase: Phase) -> tuple[Copy, ...]:
    """The signs in a log that ran out of memory in torch; the most certain sign comes first."""
    small = _larger_than_card(case, memory, phase)
    once = (
        "load the model once; over several cards choose one: a whole model on each card, or one"
        " model sharded over them"
    )
    if small:
        once = (
            'load the model once, and let it be split over the cards: device_map="auto" without'
            " .to() or .cuda() behind it; no card holds a copy"
        )
    signs = (*_moved(case, mark), *_loaded_twice(case))
    found = [Copy(why, once, line) for why, line in signs]
    if small:
        found.append(Copy(small, once, evidence(mark, "the card's size")))
    return (*found, *_beyond_one_copy(case, mark, memory))


def _moved(case: LogCase, mark: LogEvent) -> Iterator[tuple[str, Evidence]]:
    """Yields a model that was distributed over the cards, and then moved onto one card."""
    placed = case.facts.subject.auto_map
    moves = [frame.code for frame in mark.stack if _MOVES.search(frame.code)]
    if placed and moves and any(_MODULE.search(frame.path) for frame in mark.stack):
        line, text = placed
        yield (
            f'device_map="auto" had placed the model over the cards, and `{moves[0].strip()}` moves'
            " the whole of it onto one",
            Evidence(line=line, text=text.strip()[:240], tells="the model is placed"),
        )


def _loaded_twice(case: LogCase) -> Iterator[tuple[str, Evidence]]:
    """Yields a program's loads of whole models, if it has more than its launcher started processes.

    A progress bar that is drawn again in the next line belongs to the same load.
    """
    marks = [mark for mark, _ in case.facts.every(ModelLoaded)]
    loads = [now for before, now in pairwise(marks) if now.line - before.line > 1]
    ranks = case.facts.subject.ranks
    if len(loads) + 1 <= (ranks[0] if ranks else 1) or not loads:
        return
    shards = ", and `device_map=auto` shards each over the same cards"
    sharded = shards if case.facts.subject.auto_map else ""
    yield (
        f"the program loaded the whole model {len(loads) + 1} times{sharded}: replicas, or"
        " replicas and shards at once, so every copy after the first meets cards that are already"
        " full",
        evidence(loads[0], "the model is loaded again"),
    )


def _larger_than_card(case: LogCase, memory: TorchMemory, phase: Phase) -> str:
    """The reason why no card of the log holds one copy; empty if one does, or if it is unknown."""
    loads = phase in ("weights", "unknown") and not case.facts.subject.of_lmdeploy
    if case.model is None or memory.total is None or not loads:
        return ""
    weights = case.model.weight_bytes
    if weights <= memory.total:
        return ""
    return (
        f"a whole copy of {case.model.name} is {format_bytes(weights)} of weights as published, and"
        f" GPU {memory.gpu} has {format_bytes(memory.total)}: a copy on each card cannot be, one"
        " that is split over the cards can"
    )


def _beyond_one_copy(case: LogCase, mark: LogEvent, memory: TorchMemory) -> Iterator[Copy]:
    """Yields this process's bytes beyond one copy of the model and its longest request."""
    held = memory.allocated or memory.process
    trains = any(_TRAINS.search(f"{frame.path} {frame.code}") for frame in mark.stack)
    if case.model is None or held is None or case.facts.subject.of_lmdeploy or trains:
        return
    weights, most = case.model.weight_bytes, _most(case.model)
    if most is not None and held - most >= _BEYOND:
        yield Copy(
            f"{case.model.name} has {format_bytes(weights)} of weights, and with its longest"
            f" request it takes at most {format_bytes(most)}: {format_bytes(held - most)} of what"
            " this process held are beyond that. Either the model is in this process a second"
            " time, whole or in part, as after a notebook cell that ran twice (a copy is"
            f" {format_bytes(weights)}), or its weights were loaded in 32 bits (no torch_dtype),"
            " or requests were computed together",
            "restart the notebook's kernel (or the program) and load the model once: a first copy,"
            " if there is one, ends with it; nvidia-smi shows what is left on the card",
            evidence(mark, "what this process held"),
        )


def _most(model: Model) -> int | None:
    """An upper bound in bytes of one copy under Transformers with its longest request."""
    try:
        told = plan(PlanRequest.of(model=model, on=_LARGE_CARD, engine="transformers"))
    except TurbofitError:
        return None
    return max(gpu.peak for gpu in told.gpus)
