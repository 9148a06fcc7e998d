"""What turbofit learned on this machine, for later plans: JSON documents below ``learned/``.

Each model has a folder, in which a document is named by its kind and by the facts that it depends
on. What pretend GPUs taught is apart: a real plan never reads it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from turbofit.core.process.files import StateFile, digest_of_parts, state_dir
from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T", bound=Struct)


def learned(
    kind: str, type_: type[T], model: str, *facts: Any, pretend: bool = False
) -> StateFile[T]:
    """The document of a kind for a model (`memory.calibrated.identity`) and these facts."""
    text = msgspec.json.encode(facts, order="deterministic").decode()
    folder = _folder(pretend) + digest_of_parts(model)
    return StateFile(folder, f"{kind}-{digest_of_parts(text)}", type_)


def all_learned(kind: str, type_: type[T], *, pretend: bool) -> list[T]:
    """All documents of a kind, of any model; those that cannot be read are left out."""
    found = []
    for path in sorted(state_dir(_folder(pretend), make=False).glob(f"*/{kind}-*.json")):
        with suppress(OSError, ValueError, RecursionError):
            found.append(msgspec.json.decode(path.read_bytes(), type=type_))
    return found


def forget(model: str, *, pretend: bool) -> int:
    """Delete all that was learned of a model; returns the number of documents."""
    gone = 0
    folder: Path = state_dir(_folder(pretend) + digest_of_parts(model), make=False)
    for path in folder.glob("*.json"):
        with suppress(OSError):
            path.unlink()
            gone += 1
    return gone


def _folder(pretend: bool) -> str:
    return "learned-pretend/" if pretend else "learned/"
