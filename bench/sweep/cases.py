"""Random plans over presets, cards and options."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from turbofit.machine.presets import preset_names
from turbofit.model.presets import known_presets

#: Options of a request, each with the values tried; most requests have none of them.
_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "engine": ("turbomind", "pytorch"),
    "dtype": ("float16", "bfloat16"),
    "quant_policy": (4, 8),
    "images": (0, 2),
    "context": (2048, 8192),
    "goal": ("latency", "context"),
    "max_batch_size": (1, 64),
    "max_prefill_token_num": (2048,),
    "cache_max_entry_count": (0.5,),
    "enable_prefix_caching": (True,),
}
_CARDS = (1, 1, 1, 2, 4, 8)


class Case(NamedTuple):
    """One request, as keywords of `turbofit.plan`."""

    model: str
    on: str
    options: dict[str, Any]

    def __str__(self) -> str:
        flags = (f"--{name.replace('_', '-')} {value}" for name, value in self.options.items())
        return " ".join((f"plan {self.model} --on {self.on}", *flags))


def cases(count: int, seed: int) -> Iterator[Case]:
    """So many requests, the same ones for the same seed."""
    chance = random.Random(seed)
    models, cards = known_presets(), preset_names()
    for _ in range(count):
        names = chance.sample(sorted(_OPTIONS), chance.choice((0, 0, 1, 1, 2)))
        yield Case(
            model=chance.choice(models),
            on=f"{chance.choice(_CARDS)}x{chance.choice(cards)}",
            options={name: chance.choice(_OPTIONS[name]) for name in names},
        )
