"""The requests of a load, drawn one after the other; the same seed draws the same."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.load.spec import LoadSpec
    from turbofit.load.trace import TracedRequest

__all__ = ["RequestShape", "arrivals", "drawn", "replayed"]

#: Requests of a trace that say nothing of their length get a token.
_LEAST: Final = 1


class RequestShape(NamedTuple):
    """How large one request is; ``shared`` of its prompt's tokens all requests have alike."""

    prompt_tokens: int
    output_tokens: int
    images: tuple[tuple[int, int], ...]
    shared: int = 0


def drawn(spec: LoadSpec) -> Iterator[RequestShape]:
    """Requests without end."""
    draw = random.Random(spec.seed)
    while True:
        yield RequestShape(
            prompt_tokens=_about(draw, spec.prompt_tokens, spec.prompt_spread),
            output_tokens=_about(draw, spec.output_tokens, spec.output_spread),
            images=tuple(draw.choice(spec.image_size) for _ in range(spec.images)),
            shared=spec.shared_prefix,
        )


def replayed(trace: Sequence[TracedRequest]) -> Iterator[RequestShape]:
    """The requests of a trace, once."""
    for one in trace:
        yield RequestShape(max(_LEAST, one.text_tokens), max(_LEAST, one.output_tokens), one.images)


def arrivals(spec: LoadSpec, trace: Sequence[TracedRequest]) -> Iterator[float]:
    """Seconds after the first at which requests arrive, of an open loop or a trace."""
    if spec.rate is None:
        yield from (one.at / spec.trace_speed for one in trace)
        return
    # Not the draws of the sizes: another rate shall meet the same requests.
    draw, at = random.Random(f"{spec.seed} arrivals"), 0.0
    while True:
        yield at
        at += 1 / spec.rate if spec.evenly else draw.expovariate(spec.rate)


def _about(draw: random.Random, mean: int, spread: float) -> int:
    """A whole number evenly within the spread around its mean."""
    half = int(mean * spread)
    return max(_LEAST, mean + draw.randint(-half, half))
