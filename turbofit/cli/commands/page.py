"""``turbofit page``: a static site that says what fits on which card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import JSON, filled, options_of
from turbofit.cli.terminal.output import Form, answer, say
from turbofit.core.struct import to_json
from turbofit.report.fit_site.choices import SiteRequest


@command(
    Option("--out", metavar="DIR", type=PATH, default="turbofit-page"),
    *options_of(SiteRequest),
    JSON,
)
def page(*, out: str, form: Form, **given: Any) -> int:
    from turbofit.report.fit_site.site import write_site

    document = write_site(filled(SiteRequest, given), Path(out), say=say)
    answer(to_json(document) if form.as_json else f"{Path(out) / 'index.html'}\n")
    return 0
