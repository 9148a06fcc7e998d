"""Every shape that LMDeploy could run on the GPUs that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from turbofit.core.machine import Gpu
from turbofit.memory.engine import Engine
from turbofit.tuner.ask import Ask, vision_load_of
from turbofit.tuner.search.constraints import dtype_for
from turbofit.tuner.search.groups import groupings, kinds, like_groups, mixed_groupings
from turbofit.tuner.search.sizing import Shape, shortest_context

__all__ = ["PREFILL_SIZES", "no_shape", "shapes"]

PREFILL_SIZES = (8192, 4096, 2048, 1024)
#: A context that few miss. The longer ones of a cache let more images meet in TurboMind's forward,
#: which costs cache: where that costs requests at once, the plan is content with this one.
_ENOUGH_CONTEXT = 32768
_LARGEST_TP = 8


def shapes(ask: Ask, engine: Engine) -> Iterator[Shape]:
    """Every shape that LMDeploy could run here, at the asked limit."""
    fixed_prefill = ask.fixed.get("max_prefill_token_num")
    prefills = (fixed_prefill,) if isinstance(fixed_prefill, int) else PREFILL_SIZES
    for groups in _groupings(ask, engine):
        own = len(like_groups(ask.machine, groups)) > 1
        for prefill, longest in product(prefills[:1] if own else prefills, _contexts(ask)):
            yield Shape(
                tp=max(map(len, groups)),
                groups=groups,
                max_prefill_token_num=prefill,
                limit=ask.own_limit,
                longest=longest,
                prefills=prefills if own else (),
            )


def _groupings(ask: Ask, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Ways to cut the visible GPUs into groups; over unequal cards only where that was asked.

    And where what was asked is not possible over equal ones.
    """
    if ask.groups is not None:
        yield ask.groups
        return
    equal = [*_mixed(ask, engine), *_equal(ask, engine)]
    yield from equal or _asked(ask, engine)


def _equal(ask: Ask, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Engines on cards of one kind."""
    for gpus in kinds(ask.visible):
        for tp in _tps(ask, gpus, engine):
            for replicas in _replicas(ask, len(gpus) // tp):
                yield from groupings(ask.machine, gpus, tp, replicas)


def _mixed(ask: Ask, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Engines on unequal cards side by side, each on equal ones, all with one dtype."""
    parts = [gpus for gpus in kinds(ask.visible) if not gpus[0].mig]
    if len(parts) < 2:
        return
    if "dtype" not in ask.fixed:
        first = dtype_for(ask.model, parts[0])[0]
        parts = [gpus for gpus in parts if dtype_for(ask.model, gpus)[0] == first]
    tps = [_tps(ask, gpus, engine) for gpus in parts]
    yield from mixed_groupings(ask.machine, parts, tps, ask.replicas)


def _asked(ask: Ask, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Engines over unequal cards, for a degree that was asked for.

    Packed weights take another form on some cards, and an account knows one form in a group.
    """
    gpus, tp = [gpu for gpu in ask.visible if not gpu.mig], ask.tp
    if tp is None or engine.tp_problem(ask.model, tp):
        return
    if ask.model.quantization is not None and len({gpu.compute_capability for gpu in gpus}) > 1:
        return
    for replicas in _replicas(ask, len(gpus) // tp):
        yield from groupings(ask.machine, gpus, tp, replicas)


def _tps(ask: Ask, gpus: Sequence[Gpu], engine: Engine) -> list[int]:
    """Degrees that cards of one kind could run; MIG instances have no peers for NCCL to join."""
    most = 1 if gpus[0].mig else min(len(gpus), _LARGEST_TP)
    asked = range(1, most + 1) if ask.tp is None else range(ask.tp, ask.tp + 1)
    return [
        tp
        for tp in asked
        if tp <= len(gpus) and (tp == 1 or not gpus[0].mig) and not engine.tp_problem(ask.model, tp)
    ]


def _contexts(ask: Ask) -> tuple[int | None, ...]:
    """The longest that the cache holds, and less where images and nobody's wish are at stake."""
    asked = vision_load_of(ask, ask.own_limit)
    free = ask.workload.context is None and "session_len" not in ask.fixed
    longer = ask.model.text.max_position_embeddings > _ENOUGH_CONTEXT
    enough = shortest_context(asked) <= _ENOUGH_CONTEXT
    if asked.units_per_image and free and longer and enough and ask.workload.goal != "context":
        return (None, _ENOUGH_CONTEXT)
    return (None,)


def _replicas(ask: Ask, most: int) -> Sequence[int]:
    if ask.replicas is not None:
        return (ask.replicas,) if ask.replicas <= most else ()
    return range(1, most + 1)


def no_shape(ask: Ask, engine: Engine) -> str:
    """Why there is no shape at all."""
    count = len(ask.visible)
    if ask.tp is not None:
        problem = engine.tp_problem(ask.model, ask.tp)
        if problem:
            return f"--tp {ask.tp} is not possible for {ask.model.name}: {problem}"
        need = ask.tp * (ask.replicas or 1)
        largest = max((len(kind) for kind in kinds(ask.visible)), default=0)
        if need <= count:
            return (
                f"--tp {ask.tp} would split over unequal GPUs, which MIG instances and 4-bit"
                " weights on several generations of cards do not allow"
            )
        return f"--tp {ask.tp} needs {need} equal GPUs; there are {largest} of {count} visible"
    if ask.replicas is not None and ask.replicas > count:
        return f"--replicas {ask.replicas} needs as many GPUs; {count} are visible"
    return f"no tensor-parallel degree suits {ask.model.name} on {count} GPUs"
