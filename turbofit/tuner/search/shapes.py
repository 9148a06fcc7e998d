"""Every shape that LMDeploy could run on the GPUs that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from turbofit.core.machine import Gpu
from turbofit.core.messages import plural
from turbofit.memory.engine import Engine
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.constraints import dtype_for
from turbofit.tuner.search.groups import groupings, kinds, like_groups, mixed_groupings
from turbofit.tuner.search.shape import Shape

__all__ = ["PREFILL_SIZES", "no_shape", "shapes", "split_over_slices"]

PREFILL_SIZES = (8192, 4096, 2048, 1024)
_LARGEST_TP = 8


def shapes(request: ResolvedRequest, engine: Engine) -> Iterator[Shape]:
    """Every shape that LMDeploy could run here, at the asked limit."""
    fixed_prefill = request.fixed.get("max_prefill_token_num")
    prefills = (fixed_prefill,) if isinstance(fixed_prefill, int) else PREFILL_SIZES
    for groups in _groupings(request, engine):
        mixed_cards = len(like_groups(request.machine, groups)) > 1
        for prefill in prefills[:1] if mixed_cards else prefills:
            yield Shape(
                tp=max(map(len, groups)),
                groups=groups,
                max_prefill_token_num=prefill,
                limit=request.requested_limit,
                prefills=prefills if mixed_cards else (),
            )


def _groupings(request: ResolvedRequest, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Ways to cut the visible GPUs into groups; over unequal cards only where that was asked.

    And where what was asked is not possible over equal ones.
    """
    if request.groups is not None:
        yield request.groups
        return
    equal = [*_mixed(request, engine), *_equal(request, engine)]
    found = equal or list(_requested_shape(request, engine))
    enough = [groups for groups in found if len(groups) >= _least_engines(request)]
    yield from enough or found


def _least_engines(request: ResolvedRequest) -> int:
    """Engines without which a batch that is given does not run the requests that are given."""
    batch, requests = request.fixed.get("max_batch_size"), request.workload.concurrency
    return ceil(requests / batch) if isinstance(batch, int) and requests is not None else 1


def _equal(request: ResolvedRequest, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Engines on cards of one kind."""
    for gpus in kinds(request.visible):
        for tp in _tps(request, gpus, engine):
            for replicas in _replicas(request, len(gpus) // tp):
                yield from groupings(request.machine, gpus, tp, replicas)


def _mixed(request: ResolvedRequest, engine: Engine) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Engines on unequal cards side by side, each on equal ones, all with one dtype."""
    parts = [gpus for gpus in kinds(request.visible) if not gpus[0].mig]
    if len(parts) < 2:
        return
    if "dtype" not in request.fixed:
        first = dtype_for(request.model, parts[0])[0]
        parts = [gpus for gpus in parts if dtype_for(request.model, gpus)[0] == first]
    tps = [_tps(request, gpus, engine) for gpus in parts]
    yield from mixed_groupings(request.machine, parts, tps, request.replicas)


def _requested_shape(
    request: ResolvedRequest, engine: Engine
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Engines over unequal cards, for a degree that was asked for.

    Packed weights take another form on some cards, and an account knows one form in a group.
    """
    gpus, tp = [gpu for gpu in request.visible if not gpu.mig], request.tp
    if tp is None or engine.tp_problem(request.model, tp):
        return
    if request.model.quantization is not None and len({gpu.compute_capability for gpu in gpus}) > 1:
        return
    for replicas in _replicas(request, len(gpus) // tp):
        yield from groupings(request.machine, gpus, tp, replicas)


def _tps(request: ResolvedRequest, gpus: Sequence[Gpu], engine: Engine) -> list[int]:
    """Degrees that cards of one kind could run; MIG instances have no peers for NCCL to join."""
    most = 1 if gpus[0].mig else min(len(gpus), _LARGEST_TP)
    degrees = range(1, most + 1) if request.tp is None else range(request.tp, request.tp + 1)
    return [
        tp
        for tp in degrees
        if tp <= len(gpus)
        and (tp == 1 or not gpus[0].mig)
        and not engine.tp_problem(request.model, tp)
    ]


def _replicas(request: ResolvedRequest, most: int) -> Sequence[int]:
    if request.replicas is not None:
        return (request.replicas,) if request.replicas <= most else ()
    return range(1, most + 1)


def no_shape(request: ResolvedRequest, engine: Engine) -> str:
    """Why there is no shape at all."""
    count = len(request.visible)
    if request.tp is not None:
        problem = engine.tp_problem(request.model, request.tp)
        if problem:
            return f"--tp {request.tp} is not possible for {request.model.name}: {problem}"
        need = request.tp * (request.replicas or 1)
        largest = max((len(kind) for kind in kinds(request.visible)), default=0)
        whole = sum(not gpu.mig for gpu in request.visible)
        if need <= count:
            return (
                split_over_slices(request.tp, whole)
                if whole < need
                else f"--tp {request.tp} would split over unequal GPUs, which 4-bit weights on"
                " several generations of cards do not allow"
            )
        return f"--tp {request.tp} needs {need} equal GPUs; there are {largest} of {count} visible"
    if request.replicas is not None and request.replicas > count:
        return f"--replicas {request.replicas} needs as many GPUs; {count} are visible"
    gpus, problem = f"{count} {plural(count, 'GPU')}", engine.tp_problem(request.model, 1)
    if problem:
        return f"{request.model.name} cannot run on the {engine.name} engine: {problem}"
    return f"no tensor-parallel degree suits {request.model.name} on {gpus}"


def split_over_slices(tp: int, whole: int) -> str:
    """Why MIG slices are no group: of several GPUs, so many are whole."""
    return (
        f"--tp {tp} would split over MIG slices, of which a CUDA process sees one and NCCL joins"
        f" none; of the GPUs {whole} are whole. --replicas runs an engine on each slice"
    )
