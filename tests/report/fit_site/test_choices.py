"""The choices of the site, and the request that each combination is."""

from __future__ import annotations

import shlex

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.units import GIB, MIB
from turbofit.report.fit_site.choices import SiteRequest, choices_of, points


def test_the_default_is_whole() -> None:
    few, choices = (choices_of(SiteRequest.of(all=every), "today") for every in (False, True))
    assert few.answers == 10 * 11 * 3 * 2
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
    assert [one.words for one in choices.used] == ["", ":used=1000B", ":used=3073MiB"]


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"models": ("internvl9-8b",)}, "'internvl9-8b' is no model by name"),
        ({"cards": ("rtx4091",)}, "'rtx4091' is no card by name"),
        ({"counts": (1, 99)}, "99xrtx3060"),
        ({"cards": ("h100", "rtx3060"), "used": ("20GiB",)}, "more than the 11.6 GiB"),
    ],
)
def test_what_no_table_could_answer(values: dict[str, tuple[object, ...]], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        choices_of(SiteRequest.of(**values), "today")


def test_every_name_that_plan_takes_is_offered_once() -> None:
    """By the preset's name: it is a file's too."""
    request = SiteRequest.of(
        models=("OpenGVLab/InternVL2-2B", "mineru2.5", "internvl2-2b"),
        cards=("rtx3090", "3090", "RTX 4090"),
    )
    choices = choices_of(request, "today")
    assert [one.name for one in choices.models] == ["internvl2-2b", "mineru2.5-1.2b"]
    assert [one.name for one in choices.cards] == ["rtx3090", "rtx4090"]
