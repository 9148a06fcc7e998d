"""A small site: its choices, and the commands that its answers stand for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from turbofit.cli.main import main
from turbofit.core.units import GIB
from turbofit.report.fit_site.choices import SiteChoice, SiteChoices, SiteRequest

#: A model with tiles and one with patches; a card that is too small and one that is not.
REQUEST = SiteRequest.of(
    models=("internvl3-8b", "qwen2.5-vl-7b-awq"),
    cards=("rtx3060", "rtx4090"),
    counts=(1, 2),
    used=(2 * GIB,),
    images=((4, (1280, 720)),),
    contexts=(8192,),
)


class Chosen(NamedTuple):
    """What the controls of one side show."""

    model: str
    card: str
    count: int
    used: SiteChoice
    images: SiteChoice
    context: SiteChoice
    requests: SiteChoice

    def keys(self) -> dict[str, str]:
        """The entry of each control."""
        return {
            "model": self.model, "card": self.card, "count": str(self.count),
            "used": self.used.key, "images": self.images.key, "context": self.context.key,
            "requests": self.requests.key,
        }  # fmt: skip

    def fragment(self) -> str:
        """The link that chooses it."""
        return "#" + "&".join(f"{name}={key}" for name, key in self.keys().items()) + "&lang=en"

    def command(self) -> list[str]:
        """The words of the command line behind `turbofit`."""
        words = f"{self.images.words} {self.context.words} {self.requests.words}".split()
        return ["plan", self.model, "--on", f"{self.count}x{self.card}{self.used.words}", *words]

    def place(self, choices: SiteChoices) -> int:
        """Where a table has its answer."""
        place = choices.counts.index(self.count)
        for every, one in (
            (choices.used, self.used), (choices.images, self.images),
            (choices.contexts, self.context), (choices.concurrencies, self.requests),
        ):  # fmt: skip
            place = place * len(every) + every.index(one)
        return place


def drawn(choices: SiteChoices, number: int) -> Iterator[Chosen]:
    """So many choices, the same ones in every run."""
    chance = random.Random(number)
    for _ in range(number):
        yield Chosen(
            chance.choice(choices.models).name,
            chance.choice(choices.cards).name,
            chance.choice(choices.counts),
            chance.choice(choices.used),
            chance.choice(choices.images),
            chance.choice(choices.contexts),
            chance.choice(choices.concurrencies),
        )


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `turbofit plan … --json` says, once for each."""
    key = tuple(words)
    if key not in _PLANNED:
        main([*words, "--json"])
        _PLANNED[key] = json.loads(capsys.readouterr().out)
    return _PLANNED[key]


_PLANNED: dict[tuple[str, ...], dict[str, Any]] = {}
