"""Results of `turbofit tune` on disk: a file a model, promise, load, kind of cards and LMDeploy.

They are in the user's state folder. Those of pretend GPUs are kept apart: a real plan never reads
them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.process.files import digest_of_parts, state_dir, write_atomic
from turbofit.core.struct import to_json
from turbofit.core.tuning import TUNE_SCHEMA, Tuning

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from turbofit.core.machine import Machine

#: What does not change which settings are best.
_NO_PROMISE: Final = ("model", "revision", "on", "gpus", "no_tuned", "margin", "goal")


def cards_of(machine: Machine) -> tuple[str, ...]:
    """The names of the visible cards, sorted."""
    return tuple(sorted(machine.gpu(index).name for index in machine.visible))


def promise_of(given: Mapping[str, object]) -> dict[str, object]:
    """What a person asks of a plan, as far as a tuning depends on it.

    Args:
        given: the fields of a request that were given.
    """
    options = plain({name: value for name, value in given.items() if name not in _NO_PROMISE})
    return {name: value for name, value in options.items() if (name, value) != ("engine", "auto")}


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """Options as a stored document has them, so that they can be compared."""
    options: dict[str, object] = json.loads(json.dumps(values, default=str, sort_keys=True))
    return options


def keep_tuned(tuning: Tuning) -> Path:
    """Store one for later plans; an older one of the same kind is replaced.

    Raises:
        OSError: the state folder cannot be made.
        UsageError: the file cannot be written.
    """
    path = _folder(pretend=tuning.pretend) / f"{_name(tuning)}.json"
    write_atomic(path, to_json(tuning), mode=0o600)
    return path


def recall_tuned(*, pretend: bool) -> tuple[Tuning, ...]:
    """All that are kept, the newest first; what cannot be read is left out."""
    tunings = []
    for path in _folder(pretend=pretend, make=False).glob("*.json"):
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            tuning = msgspec.json.decode(path.read_bytes(), type=Tuning)
            if tuning.schema == TUNE_SCHEMA and tuning.pretend == pretend:
                tunings.append(tuning)
    return tuple(sorted(tunings, key=lambda tuning: tuning.created, reverse=True))


def forget_tuned(model: str, *, pretend: bool) -> int:
    """Drop all of a model; how many there were."""
    gone = 0
    for tuning in recall_tuned(pretend=pretend):
        if tuning.model == model:
            with suppress(OSError):
                (_folder(pretend=pretend, make=False) / f"{_name(tuning)}.json").unlink()
                gone += 1
    return gone


def _name(tuning: Tuning) -> str:
    parts = (
        tuning.model, tuning.gpus, tuning.driver, tuning.lmdeploy, tuning.promise, tuning.load,
        tuning.goal, tuning.slo,
    )  # fmt: skip
    return digest_of_parts(json.dumps(parts, sort_keys=True, default=str))


def _folder(*, pretend: bool, make: bool = True) -> Path:
    return state_dir("tuned-pretend" if pretend else "tuned", make=make)
