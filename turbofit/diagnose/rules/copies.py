"""Finds models that one program holds more than once, and models too large for any card of a log.

The signs are the loads in a log, the source lines of its traceback, and its figures: turbofit knows
the most that one copy of a model and its longest request take; the rest is another copy's.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.rules.draft import evidence, evidence_at
from turbofit.observe.log_events import ModelLoaded, TorchMemory
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.model import Model
    from turbofit.diagnose.answer import Evidence
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.rules.draft import RuleAnswer

#: A card that is large enough for any such model; it serves only to compute one copy's bytes.
_LARGE_CARD: Final = "1xh200:total=1000GiB"
_MOVES: Final = re.compile(r"\.(?:to|cuda)\(")
_MODULE: Final = re.compile(r"[/\\]torch[/\\]nn[/\\]modules[/\\]module\.py$")
#: Words of training, which holds more memory than an answer needs.
_TRAINS: Final = re.compile(r"\bbackward\(|optimizer|[/\\](?:trainer|autograd)\b")
#: Bytes beyond one copy that are more than rounding and torch's own cache.
_BEYOND: Final = GIB
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


def with_copies(
    case: LogCase, mark: LogEvent, memory: TorchMemory, answer: RuleAnswer
) -> RuleAnswer:
    """An answer to torch's lack of memory, with the signs that a model is loaded once too often."""
    small = _larger_than_card(case, memory, answer)
    signs = [*_moved(case, mark), *_loaded_twice(case)]
    beyond = _beyond_one_copy(case, mark, memory)
    changes = [_SPLIT if small else _ONCE] if small or signs else []
    changes += [_RESTART] if beyond else []
    return replace(
        answer,
        why=(*answer.why, *(why for why, _ in signs), *filter(None, (small, beyond))),
        evidence=(*answer.evidence, *(line for _, line in signs)),
        changes=(*changes, *answer.changes),
    )


def _moved(case: LogCase, mark: LogEvent) -> Iterator[tuple[str, Evidence]]:
    """Yields a model that was distributed over the cards, and then moved onto one card."""
    placed = case.facts.subject.auto_map
    moves = [frame.code for frame in mark.stack if _MOVES.search(frame.code)]
    if placed and moves and any(_MODULE.search(frame.path) for frame in mark.stack):
        yield (
            f'device_map="auto" had placed the model over the cards, and `{moves[0].strip()}` moves'
            " the whole of it onto one",
            evidence_at(placed, "the model is placed"),
        )


def _loaded_twice(case: LogCase) -> Iterator[tuple[str, Evidence]]:
    """Yields a program's loads of whole models, if it has more than its launcher started processes.

    A progress bar that is drawn again in the next line belongs to the same load.
    """
    marks = [mark for mark, _ in case.facts.every(ModelLoaded)]
    again = [now for before, now in pairwise(marks) if now.line - before.line > 1]
    ranks = case.facts.subject.ranks
    if again and len(again) + 1 > (ranks[0] if ranks else 1):
        shards = ", and `device_map=auto` shards each over the same cards"
        yield (
            f"the program loaded the whole model {len(again) + 1} times"
            f"{shards if case.facts.subject.auto_map else ''}: replicas, or replicas and shards at"
            " once, so every copy after the first meets cards that are already full",
            evidence(again[0], "the model is loaded again"),
        )


def _larger_than_card(case: LogCase, memory: TorchMemory, answer: RuleAnswer) -> str:
    """The reason why no card of the log holds one copy; empty if one does, or if it is unknown."""
    loads = answer.phase in ("weights", "unknown") and not case.facts.subject.of_lmdeploy
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


def _beyond_one_copy(case: LogCase, mark: LogEvent, memory: TorchMemory) -> str:
    """A sentence on bytes beyond one copy and its longest request; empty if there are none."""
    held = memory.allocated or memory.process
    trains = any(_TRAINS.search(f"{frame.path} {frame.code}") for frame in mark.stack)
    if case.model is None or held is None or case.facts.subject.of_lmdeploy or trains:
        return ""
    weights, most = case.model.weight_bytes, _most(case.model)
    if most is None or held - most < _BEYOND:
        return ""
    return (
        f"{case.model.name} has {format_bytes(weights)} of weights, and with its longest request it"
        f" takes at most {format_bytes(most)}: {format_bytes(held - most)} of what this process"
        " held are beyond that. Either the model is in this process a second time, whole or in"
        " part, as after a notebook cell that ran twice, or its weights were loaded in 32 bits (no"
        " torch_dtype), or requests were computed together"
    )


def _most(model: Model) -> int | None:
    """An upper bound in bytes of one copy under Transformers with its longest request."""
    try:
        told = plan(PlanRequest.of(model=model, on=_LARGE_CARD, engine="transformers"))
    except TurbofitError:
        return None
    return max(gpu.peak for gpu in told.gpus)
