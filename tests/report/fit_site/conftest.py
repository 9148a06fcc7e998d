"""One small site for all tests of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.fit_site.sites import REQUEST
from turbofit.report.fit_site.choices import SiteChoices, choices_of
from turbofit.report.fit_site.site import write_site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's page, with its tables beside it."""
    folder = tmp_path_factory.mktemp("site")
    write_site(REQUEST, folder, say=str)
    return folder / "index.html"


@pytest.fixture(scope="session")
def choices() -> SiteChoices:
    """What its controls offer."""
    return choices_of(REQUEST, "today")
