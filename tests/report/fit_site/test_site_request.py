"""What a person may ask of the site."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.units import GIB
from turbofit.report.fit_site.choices import SiteRequest


def test_all_has_more_of_what_is_not_given() -> None:
    few, more = (SiteRequest.of(all=every, contexts=(4096,)).complete() for every in (False, True))
    assert (few.used, few.images, few.contexts) == ((), ((1, (1920, 1080)),), (4096,))
    assert (more.used, more.contexts) == ((2 * GIB,), (4096,))
    assert more.images == ((1, (1920, 1080)), (4, (1280, 720)))


@pytest.mark.parametrize("text", ["x", "4@", "@1x1", "4@wide", "-1", "4@12"])
def test_images_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        SiteRequest.of_options({"images": (text,)}, str)
