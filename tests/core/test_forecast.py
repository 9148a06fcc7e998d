"""How sure a forecast is, in words, and whether the host or the GPUs decide it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from turbofit.core.forecast import HostImages, Surety

KIND = "text of InternVL2"
SURE = Surety(kind=KIND, word="good", figures=7, median=0.04, p90=0.1, worst=1.2, seen=True)


@pytest.mark.parametrize(
    ("word", "told"), [("good", 1.2), ("rough", 1.2), ("order", None), ("unknown", None)]
)
def test_a_figure_is_told_within_a_factor_of_two(word, told) -> None:
    assert replace(SURE, word=word).shown(1.234, 1) == told


def test_the_errors_are_told_with_the_cards_that_had_them() -> None:
    errors = f"{KIND}: median error 4.0%, p90 10.0%, worst 1.2 times over 7 figures"
    assert (SURE.words, replace(SURE, seen=False).words) == (errors, f"{errors} of other cards")
    assert replace(SURE, p90=None).words == f"{KIND}: no figure is known"
    why = f"forecasts of {KIND} were up to 1.2 times off"
    assert SURE.why == why
    assert replace(SURE, seen=False, measured="3 on an L4").why == (
        f"{why}, of other cards (3 on an L4)"
    )
    assert replace(SURE, worst=None).why == f"nobody has measured {KIND}"


@dataclass(frozen=True)
class Rates:
    gpus: float | None
    binds: bool
    words: str


@pytest.mark.parametrize(
    "rates",
    [
        Rates(20.0, binds=True, words="1 core prepares 10 images/s, the GPUs take 20"),
        Rates(5.0, binds=False, words="1 core prepares 10 images/s, the GPUs take 5.0"),
        Rates(None, binds=False, words="1 core prepares 10 images/s"),
    ],
)
def test_the_slower_of_host_and_gpus_decides(rates: Rates) -> None:
    host = HostImages(
        cores=1, images_per_second=10.0, gpu_images_per_second=rates.gpus,
        measured=True,
    )  # fmt: skip
    assert (host.binds, host.words) == (rates.binds, rates.words)
