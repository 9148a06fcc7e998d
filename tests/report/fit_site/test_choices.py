"""The choices of the site, and the request that each combination is."""

from __future__ import annotations

import shlex

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.units import GIB, MIB
from turbofit.report.fit_site.choices import choices_of, points
from turbofit.report.fit_site.site_request import SiteRequest


def test_the_default_is_whole() -> None:
    choices = choices_of(SiteRequest.of(), "today")
    assert choices.answers == 10 * 11 * 3 * 2 * 3 * 3 * 3
    assert choices.answers == len(choices.models) * len(choices.cards) * len(list(points(choices)))
    assert [one.key for one in choices.used] == ["0", "2GiB"]
    assert [one.key for one in choices.images] == ["1", "1@1920x1080", "4@1280x720"]
    assert [one.key for one in choices.contexts] == ["auto", "8192", "32768"]
    card = choices.cards[0]
    assert card.title == "NVIDIA GeForce RTX 3060"
    assert 0 < card.free < card.total == 12 * GIB


def test_each_point_is_what_its_words_say() -> None:
    """The words stand on the page, the request was planned: they are the same."""
    choices = choices_of(
        SiteRequest.of(
            used=(3 * GIB + MIB, 1000),
        ),
        "today",
    )
    for point in points(choices):
        request = point.request("internvl3-8b", "l4")
        given = request.option_arguments(without=("model", "on"))
        words = " ".join((point.images.words, point.context.words, point.concurrency.words))
        assert sorted(given) == sorted(shlex.split(words))
        assert request.on == f"{point.gpus}xl4{point.used.words}"
    assert [one.words for one in choices.used] == ["", ":used=1000", ":used=3073MiB"]


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"models": ("internvl9-8b",)}, "'internvl9-8b' is no model by name"),
        ({"cards": ("rtx4091",)}, "'rtx4091' is no card by name"),
    ],
)
def test_a_name_that_is_none(values: dict[str, tuple[str, ...]], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        choices_of(SiteRequest.of(**values), "today")
