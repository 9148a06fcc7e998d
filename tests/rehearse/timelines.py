"""Timelines written by hand, read as a run reads its own."""

from __future__ import annotations

from pathlib import Path

from turbofit.pretend.timeline import read_timeline
from turbofit.pretend.usage import read_usage
from turbofit.rehearse.torch.seen import HeldBytes, held_by


def held_in(folder: Path) -> tuple[HeldBytes, ...]:
    """What the processes with a timeline in a folder held."""
    return held_by(read_usage(read_timeline(path)) for path in sorted(folder.glob("*.timeline")))
