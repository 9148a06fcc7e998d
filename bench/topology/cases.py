"""Cases: one source's figures for several shapes of one model on one kind of machine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import yaml

from turbofit.core.struct import Struct

__all__ = ["HERE", "Case", "Shape", "read_cases"]

HERE = Path(__file__).resolve().parent


class Shape(Struct):
    """One shape and its figure: more is better.

    ``cards`` is a machine as turbofit spells it, of the GPUs that the shape uses; ``tp`` of them
    make an engine, of which there are as many as the machine holds. ``pcie`` is generation and
    width, where the source says them.
    """

    cards: str
    tp: int
    value: float
    pcie: tuple[int, int] | None = None
    note: str = ""


class Case(Struct):
    """Figures that one source measured on the same host.

    ``model`` is a preset; ``weights`` scales its bytes where the source quantised otherwise.
    ``at_once`` are requests at any time; ``input`` and ``output`` tokens of each. ``drafted``
    tokens are proposed a step. ``contradicts`` names a case that says the opposite of the same
    cards; ``left_out`` says why a case is shown and not judged.
    """

    id: str
    source: str
    engine: str
    model: str
    at_once: int
    input: int
    output: int
    unit: str
    shapes: tuple[Shape, ...]
    host: str = ""
    weights: float = 1.0
    drafted: int = 0
    assumed: str = ""
    contradicts: str = ""
    left_out: str = ""


def read_cases(path: Path = HERE / "cases.yaml") -> list[Case]:
    """All cases of a file."""
    return msgspec.convert(yaml.safe_load(path.read_text()), list[Case])
