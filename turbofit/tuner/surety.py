"""How sure a forecast of speed is, by its kind: the errors on published and measured rows.

`presets/engines/surety.yaml` has them; `python -m bench.speed --write` writes it.
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
    from collections.abc import Iterable, Sequence
    from typing import Literal, TypeAlias

    from turbofit.core.machine import Gpu
    from turbofit.core.model import Model

    Word: TypeAlias = Literal["good", "fair", "rough", "order"]

#: Forecasts nine of ten of which are off by no more times are good, fair or rough; of others the
#: order is told.
_TIMES: Final = (1.25, 1.5, 2.0)
_WORDS: Final[tuple[Word, ...]] = ("good", "fair", "rough", "order")
#: Of the kinds whose rows no constant was fitted to, and whose cards are none of the fit's.
UNSEEN: Final = "other cards"


class Errors(Struct):
    """The errors of one kind: shares, and by how many times nine of ten and the worst are off."""

    figures: int
    median: float
    p90: float
    times: float
    worst: float
    cards: tuple[str, ...]


@cache
def errors_of() -> dict[str, Errors]:
    """The errors of all kinds that have a figure."""
    return msgspec.convert(load_yaml(preset_path("engines", "surety")), dict[str, Errors])


def kind_of(model: Model, engine: str, *, images: bool) -> str:
    """The kind of a forecast: of texts or of the model's images, on an engine."""
    rule = model.image_rule
    what = f"images of {rule.unit_name}" if rule is not None and images else "text"
    return f"{what}, {engine}"


def with_surety(
    forecast: Throughput, model: Model, engine: str, gpus: Sequence[Gpu], *, images: bool
) -> Throughput:
    """A forecast for a model on an engine and cards, with how sure each of its figures is."""
    kind = kind_of(model, engine, images=images)
    surety = surety_of(kind, gpus)
    return replace(
        forecast,
        basis=f"{forecast.basis}; {surety.words}",
        median_error=surety.median,
        surety=surety,
        first_token=surety_of(f"first token among others, {kind}", gpus),
        first_token_alone=surety_of(f"first token alone, {kind}", gpus),
    )


def surety_of(kind: str, gpus: Iterable[Gpu]) -> Surety:
    """How sure a kind of forecast is on these cards.

    By the figures of other cards where there are none of some of these. Where there are none of
    others either, it is a word less sure.
    """
    known, cards = errors_of(), {gpu.name for gpu in gpus}
    found, other = known.get(kind), known.get(f"{kind}, {UNSEEN}")
    if found is None:
        return Surety(kind=kind, word="unknown")
    seen, sure = cards <= set(found.cards), 0
    if not seen and other is not None:
        kind, found = f"{kind}, {UNSEEN}", other
    elif not seen:
        sure = 1
    sure += sum(found.times > most for most in _TIMES)
    return Surety(
        kind=kind,
        word=_WORDS[min(sure, len(_WORDS) - 1)],
        figures=found.figures,
        median=found.median,
        p90=found.p90,
        worst=found.worst,
        seen=seen,
    )
