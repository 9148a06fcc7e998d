"""Calibrations on disk, in the user's state folder: one file per model, engine and kind of cards.

Those of pretend GPUs have their own folder, which a real plan never reads.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.installation import installed
from turbofit.core.machine import Calibration
from turbofit.core.process.files import digest_of_parts, state_dir, write_atomic
from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import to_builtins, to_json

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.json_types import Document
    from turbofit.core.machine import Machine

_LOG: Final = LazyLogger(__name__)

_SCHEMA: Final = "turbofit.calibration/1"
#: Packages of CUDA's runtime that torch requires; since CUDA 13 the name has no version.
_CUDA: Final = (
    "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu11",
)  # fmt: skip


def pretends() -> bool:
    """Whether this process itself runs on pretend GPUs (``turbofit pretend -- COMMAND``)."""
    return bool(os.environ.get("TURBOFIT_PRETEND_SCENARIO"))


def keep(calibration: Calibration, beside: Document) -> Path:
    """Store a calibration and its evidence for later plans; returns the path of its file.

    The file replaces an older one of the same kind.

    Raises:
        OSError: the state folder cannot be made.
        UsageError: the file cannot be written.
    """
    path = path_of(calibration, make=True)
    body = {"schema": _SCHEMA, "calibration": to_builtins(calibration), **beside}
    write_atomic(path, to_json(body), mode=0o600)
    return path


def completed(calibration: Calibration) -> Calibration:
    """Add the versions of torch and CUDA, and the difference in bytes from the one it replaces."""
    torch, cuda = installed("torch"), installed(*_CUDA)
    calibration = msgspec.structs.replace(calibration, torch=torch or "", cuda=cuda or "")
    before = _kept(path_of(calibration))
    change = abs(calibration.total - before.total) if before else 0
    return msgspec.structs.replace(calibration, spread=max(calibration.spread, change))


def recall(*, pretend: bool) -> tuple[Calibration, ...]:
    """All stored calibrations of real GPUs or of pretend ones; unreadable files are left out."""
    entries = map(_kept, sorted(_folder(pretend=pretend).glob("*.json")))
    return tuple(entry for entry in entries if entry is not None and entry.pretend == pretend)


def _kept(path: Path) -> Calibration | None:
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        body = msgspec.json.decode(path.read_bytes())
        if body["schema"] == _SCHEMA:
            return msgspec.convert(body["calibration"], Calibration)
    return None


def with_calibrations(machine: Machine, *, pretend: bool) -> Machine:
    """Return the machine with the calibrations of its cards and of the installed packages."""
    kept = recall(pretend=pretend)
    if not kept:
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
    _LOG.info(
        "%d of %d calibrations are of such cards, driver %s, LMDeploy %s, torch %s and CUDA %s",
        len(matching), len(kept), machine.driver, lmdeploy, torch, cuda,
    )  # fmt: skip
    return msgspec.structs.replace(machine, calibrations=matching) if matching else machine


def path_of(calibration: Calibration, *, make: bool = False) -> Path:
    """The file of a calibration's model, engine, cards and packages; ``make``: with its folder."""
    key = (
        calibration.model, calibration.engine, calibration.engine_version, *calibration.gpus,
        calibration.driver, calibration.communicator,
    )  # fmt: skip
    key += tuple(filter(None, (calibration.torch, calibration.cuda)))  # older ones have neither
    return _folder(pretend=calibration.pretend, make=make) / f"{digest_of_parts(*key)}.json"


def read(calibration: Calibration) -> Document:
    """The document stored beside a calibration.

    Raises:
        UsageError: the file can no longer be read.
    """
    try:
        document: Document = msgspec.json.decode(path_of(calibration).read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(
            f"the calibration cannot be read: {exc}", hint="turbofit calibrate MODEL --again"
        ) from None
    return document


def forget(model: str, *, pretend: bool) -> int:
    """Delete the calibrations of a model (`memory.calibrated.identity`); returns their number."""
    gone = 0
    for calibration in recall(pretend=pretend):
        if calibration.model == model:
            with suppress(OSError):
                path_of(calibration).unlink()
                gone += 1
    return gone


def _folder(*, pretend: bool, make: bool = False) -> Path:
    return state_dir("calibrations-pretend" if pretend else "calibrations", make=make)
