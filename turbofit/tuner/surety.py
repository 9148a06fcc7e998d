"""How sure a forecast of speed is, by its kind: what the errors on published and measured rows were.

`presets/engines/surety.yaml` has the errors of each kind; `python -m bench.speed --write` writes it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.plan import Surety, Throughput
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.machine import Gpu
    from turbofit.core.model import Model

#: Forecasts nine of ten of which are within such a share are good, or fair.
_GOOD: Final = 0.25
_FAIR: Final = 0.5
#: A kind of which one figure is off by more times is told as an order.
_ORDER: Final = 2.0


class Errors(Struct):
    """The errors of one kind: shares, and by how many times the worst figure is off."""

    figures: int
    median: float
    p90: float
    worst: float
    cards: tuple[str, ...]


@cache
def errors_of() -> dict[str, Errors]:
    """The errors of all kinds that have a figure."""
    return msgspec.convert(load_yaml(preset_path("engines", "surety")), dict[str, Errors])


def with_surety(
    forecast: Throughput, model: Model, engine: str, gpus: Iterable[Gpu], *, images: bool
) -> Throughput:
    """A forecast for a model on an engine and cards, with how sure each of its figures is."""
    cards, rule = {gpu.name for gpu in gpus}, model.image_rule
    what = f"images of {rule.unit_name}" if rule is not None and images else "text"
    surety = surety_of(f"{what}, {engine}", cards)
    return replace(
        forecast,
        basis=f"{forecast.basis}; {surety.words}",
        median_error=surety.median,
        surety=surety,
        first_token=surety_of(f"first token among others, {engine}", cards),
        first_token_alone=surety_of(f"first token alone, {engine}", cards),
    )


def surety_of(kind: str, cards: set[str]) -> Surety:
    """How sure a kind of forecast is on these cards: by the rows of other cards where some of these have none, and there are such rows."""
    known = errors_of()
    found, unseen = known.get(kind), known.get(f"{kind}, cards without a part in the fit")
    seen = found is not None and cards <= set(found.cards)
    if not seen and unseen is not None:
        kind, found = f"{kind}, cards without a part in the fit", unseen
    if found is None:
        return Surety(kind=kind, word="unknown")
    word = "good" if found.p90 <= _GOOD else "fair" if found.p90 <= _FAIR else "rough"
    return Surety(
        kind=kind,
        word="order" if found.worst > _ORDER else word,
        figures=found.figures,
        median=found.median,
        p90=found.p90,
        worst=found.worst,
        seen=seen,
    )
