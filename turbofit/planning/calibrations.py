"""Stores calibrations for later plans: one for each model, engine and kind of cards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from turbofit.core.installation import installed
from turbofit.core.machine import Calibration, Machine
from turbofit.core.process.files import StateFile
from turbofit.core.struct import Document, Struct, to_builtins
from turbofit.machine.learned import all_learned, learned

_SCHEMA: Final = "turbofit.calibration/1"
#: Packages of CUDA's runtime that torch requires; for CUDA 13 its name has no version.
_CUDA: Final = (
    "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu11",
)  # fmt: skip


class _Page(Struct, tag_field="schema", tag=_SCHEMA):
    """A stored calibration with its evidence."""

    calibration: Calibration


def pretends() -> bool:
    """Return whether this process itself runs on pretend GPUs (``turbofit pretend -- COMMAND``)."""
    return bool(os.environ.get("TURBOFIT_PRETEND_SCENARIO"))


def keep(calibration: Calibration, beside: Document) -> Path:
    """Store a calibration with its evidence ``beside`` for later plans; return the file's path.

    A calibration of the same model, engine, cards and packages is replaced.

    Raises:
        OSError: the state folder cannot be made.
        UsageError: the file cannot be written.
    """
    body = {"schema": _SCHEMA, "calibration": to_builtins(calibration), **beside}
    return _file(calibration).save(body)


def completed(calibration: Calibration) -> Calibration:
    """Return the calibration with the installed versions of torch and CUDA, and its spread.

    The spread, in bytes, is at least the difference between the totals of this calibration and of
    the stored calibration of the same kind.
    """
    torch, cuda = installed("torch"), installed(*_CUDA)
    calibration = msgspec.structs.replace(calibration, torch=torch or "", cuda=cuda or "")
    before = _file(calibration).read()
    change = abs(calibration.total - before.calibration.total) if before else 0
    return msgspec.structs.replace(calibration, spread=max(calibration.spread, change))


def recall(*, pretend: bool) -> tuple[Calibration, ...]:
    """Return all stored calibrations of real or of pretend GPUs, except unreadable files."""
    kept = [page.calibration for page in all_learned("calibration", _Page, pretend=pretend)]
    return tuple(calibration for calibration in kept if calibration.pretend == pretend)


def with_calibrations(machine: Machine, *, pretend: bool) -> Machine:
    """Return the machine with the stored calibrations that fit its cards, driver and packages.

    If none fits, the machine keeps its calibrations: a snapshot of a machine has its own.
    ``pretend`` selects the calibrations that were made on pretend GPUs.
    """
    if not (kept := recall(pretend=pretend)):
        return machine
    names = {gpu.name for gpu in machine.gpus}
    lmdeploy, torch, cuda = installed("lmdeploy"), installed("torch"), installed(*_CUDA)
    matching = tuple(
        calibration
        for calibration in kept
        if names.issuperset(calibration.gpus)
        and calibration.driver == str(machine.driver)
        and lmdeploy in (None, calibration.lmdeploy)
        and torch in (None, calibration.torch)
        and cuda in (None, calibration.cuda)
    )
    return msgspec.structs.replace(machine, calibrations=matching) if matching else machine


def _file(calibration: Calibration) -> StateFile[_Page]:
    """Return the file that stores a calibration.

    Model, engine, cards, driver, communicator and the versions of packages determine its path.
    """
    facts = (
        calibration.engine, calibration.engine_version, calibration.gpus, calibration.driver,
        calibration.communicator, calibration.torch, calibration.cuda,
    )  # fmt: skip
    return learned("calibration", _Page, calibration.model, facts, pretend=calibration.pretend)
