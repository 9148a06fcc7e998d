"""``turbofit page``: a static site that says what fits on which card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import filled, options_of
from turbofit.cli.terminal.output import answer
from turbofit.report.fit_site.site_request import SiteRequest


@command(
    Option(
        "--out", metavar="DIR", type=PATH, default="turbofit-page",
        help="the folder (default turbofit-page); files of the same names are replaced",
    ),
    *options_of(SiteRequest),
)  # fmt: skip
def page(*, out: str, **given: Any) -> int:

    from turbofit.report.fit_site.write_site import write_site

    answer(f"{write_site(filled(SiteRequest, given), Path(out))}\n")
    return 0
