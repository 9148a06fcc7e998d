"""What turbofit learned on this machine, for later plans: JSON documents below ``learned/``.

Each model has a folder. A document's file name has the document's kind, and a digest of the facts
on which the document depends. Documents of pretend GPUs have another folder, which no real plan
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from turbofit.core.machine import Link, Machine, Measured, PairSpeed
from turbofit.core.process.files import StateFile, digest_of_parts, state_dir
from turbofit.core.struct import Struct

T = TypeVar("T", bound=Struct)


def learned(
    kind: str, type_: type[T], model: str, *facts: Any, pretend: bool = False
) -> StateFile[T]:
    """Return the file of a document of this kind for a model; the document depends on ``facts``.

    ``model`` is an identity (`memory.calibrated.identity`).
    """
    text = msgspec.json.encode(facts, order="deterministic").decode()
    folder = _folder(pretend) + digest_of_parts(model)
    return StateFile(folder, f"{kind}-{digest_of_parts(text)}", type_)


def all_learned(kind: str, type_: type[T], *, pretend: bool) -> list[T]:
    """Return all documents of a kind, of any model; unreadable documents are left out."""
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


def with_measured(machine: Machine, measured: Measured) -> Machine:
    """Add measured speeds to a machine, with the peer access that the measured copies showed."""
    wrong = {tuple(sorted((pair.source, pair.target))) for pair in measured.pairs if not pair.right}
    links = tuple(_proved(link, measured.pairs) for link in machine.links)
    notes = tuple(
        f"GPU {a} and GPU {b} copy wrong data to each other: they are planned without peer access"
        for a, b in sorted(wrong)
    )
    warnings = (*machine.warnings, *(note for note in notes if note not in machine.warnings))
    return replace(machine, links=links, warnings=warnings, measured=measured)


def _proved(link: Link, pairs: Sequence[PairSpeed]) -> Link:
    """Return the link with the peer access that the measured copies proved.

    One wrong copy proves that the GPUs have no peer access. Right copies in only one direction
    change nothing.
    """
    both = [pair for pair in pairs if {pair.source, pair.target} == {link.a, link.b}]
    right = all(pair.right for pair in both)
    if right and len(both) < 2:
        return link
    peers = right and all(pair.peer for pair in both)
    lanes = link.nvlinks if right else 0
    return replace(link, p2p_read=peers, p2p_write=peers, nvlinks=lanes)


def keep(machine: Machine, measured: Measured) -> Path:
    """Store measured speeds for later plans on the same GPUs; return the file's path.

    Raises:
        OSError, UsageError: the folder or the file cannot be written.
    """
    return _file(machine).save(measured)


def recall(machine: Machine) -> Machine:
    """Return the machine with the stored speeds of exactly these GPUs, if any are stored."""
    measured = _file(machine).read()
    return machine if measured is None else with_measured(machine, measured)


def _file(machine: Machine) -> StateFile[Measured]:
    """Return the file for these GPUs and their driver, which decides on peer access.

    The GPUs' indices count, too, since speeds name GPUs by index: moved cards are measured again.
    """
    gpus = sorted(f"{gpu.index} {gpu.uuid}" for gpu in machine.gpus)
    return StateFile("learned/machine", digest_of_parts(*gpus, str(machine.driver)), Measured)
