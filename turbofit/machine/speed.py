"""Speeds of cards, links and the host that `turbofit calibrate` measured, for later plans.

A pair of GPUs that copies wrong data is planned without peer access: behind some IOMMUs the driver
reports peer access that the hardware does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from turbofit.core.machine import Link, Machine, Measured, PairSpeed
from turbofit.core.process.files import StateFile, digest_of_parts


def with_measured(machine: Machine, measured: Measured) -> Machine:
    """The machine with its measured speeds; copies that were checked decide on peer access."""
    wrong = {tuple(sorted((pair.source, pair.target))) for pair in measured.pairs if not pair.right}
    links = tuple(_proved(link, measured.pairs) for link in machine.links)
    notes = tuple(
        f"GPU {a} and GPU {b} copy wrong data to each other: they are planned without peer access"
        for a, b in sorted(wrong)
    )
    warnings = (*machine.warnings, *(note for note in notes if note not in machine.warnings))
    return replace(machine, links=links, warnings=warnings, measured=measured)


def _proved(link: Link, pairs: Sequence[PairSpeed]) -> Link:
    """The link, with the peer access that copies in both directions showed.

    One wrong copy is enough to refuse it; a right copy in only one direction changes nothing.
    """
    both = [pair for pair in pairs if {pair.source, pair.target} == {link.a, link.b}]
    right = all(pair.right for pair in both)
    if right and len(both) < 2:
        return link
    peers = right and all(pair.peer for pair in both)
    lanes = link.nvlinks if right else 0
    return replace(link, p2p_read=peers, p2p_write=peers, nvlinks=lanes)


def keep(machine: Machine, measured: Measured) -> Path:
    """Store the results for later plans on the same GPUs; returns the file's path.

    Raises:
        OSError, UsageError: the folder or the file cannot be written.
    """
    return _file(machine).save(measured)


def recall(machine: Machine) -> Machine:
    """The machine with stored results for exactly these GPUs; unchanged if there are none."""
    measured = _file(machine).read()
    return machine if measured is None else with_measured(machine, measured)


def _file(machine: Machine) -> StateFile[Measured]:
    """The file by the driver, which decides on peer access, and the GPUs' UUIDs.

    It includes each index, since results name GPUs by index: moved cards are measured again.
    """
    gpus = sorted(f"{gpu.index} {gpu.uuid}" for gpu in machine.gpus)
    return StateFile("learned/machine", digest_of_parts(*gpus, str(machine.driver)), Measured)
