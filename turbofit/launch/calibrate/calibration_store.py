"""From what a calibration read to what later plans know, and back."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import to_builtins
from turbofit.core.units import MIB, format_bytes
from turbofit.launch.serve.ladder import forget
from turbofit.memory.calibrated import calibration_for
from turbofit.observe import calibrations
from turbofit.observe.calibration import document, learn
from turbofit.observe.sampler import memory_now

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.json_types import Document
    from turbofit.core.machine import Calibration
    from turbofit.core.plan import Plan
    from turbofit.observe.calibration import Observation

__all__ = ["calibration_of", "learned", "relieve", "stored"]

#: Bytes by which others may have moved while a launch was measured.
_MOVED: Final = 32 * MIB


def learned(
    plan: Plan,
    seen: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn, and keep it for later plans.

    Args:
        plan: what was launched.
        seen: all that was read.
        before: bytes in use on each GPU before the last start; empty where others cannot move.
        lmdeploy: the version that ran.
        pretend: whether the GPUs were; such calibrations are kept apart.

    Returns:
        The document that `turbofit calibrate --json` shows. ``kept`` is empty where nothing was
        learned, and ``why_not`` says why.
    """
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = learn(plan, seen, lmdeploy=lmdeploy, when=when, pretend=pretend)
    found = tuple(calibrations.with_spread(one) for one in made)
    beside = {**document(plan, seen), "pretend": pretend}
    why_not, kept = _moved(plan, before), []
    if why_not is None:
        try:
            kept = [str(calibrations.keep(one, beside)) for one in found]
        except OSError as exc:
            why_not = f"the state folder cannot be written: {exc.strerror or exc}"
        except UsageError as exc:
            why_not = exc.message
    return {
        "schema": "turbofit.calibration/1",
        "calibrations": to_builtins(found),
        "kept": kept,
        "why_not": why_not,
        **beside,
    }


def relieve(plan: Plan, result: Document, lmdeploy: str, *, pretend: bool) -> bool:
    """Drop what restarts had learned of such launches, where the measurement replaces it.

    Otherwise a margin that the ladder made larger would be added to what was measured to be
    missing. Where nothing was measured to be missing, what helped the start stays.

    Returns:
        Whether anything was dropped.
    """
    more = any(one["context"] + one["buffers"] > 0 for one in result["calibrations"])
    return bool(result["kept"]) and more and forget(plan, lmdeploy, pretend=pretend)


def calibration_of(plan: Plan) -> Calibration | None:
    """What the plan's first engine rests on."""
    gpus = [plan.machine.gpu(index) for index in plan.parallel.groups[0]]
    settings, engine = plan.of_group(0).settings, plan.engine
    return calibration_for(plan.machine, gpus, plan.model, settings, engine.name, engine.version)


def stored(plan: Plan) -> Document:
    """The document that was kept of what a plan rests on, as far as it can be read."""
    one = calibration_of(plan)
    assert one is not None
    body = calibrations.read(one)
    return {
        "schema": "turbofit.calibration/1", **body, "calibrations": [to_builtins(one)],
        "kept": [str(calibrations.path_of(one))], "why_not": None,
    }  # fmt: skip


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Whether somebody else took or gave memory meanwhile, which would be counted as ours."""
    for gpu in plan.gpus:
        if gpu.index in before:
            more = memory_now(gpu.uuid).used - before[gpu.index]
            if abs(more) > _MOVED:
                said = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {said} than before: somebody else's memory moved"
    return None
