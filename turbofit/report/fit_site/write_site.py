"""Writes the site: one page, and a script with the answers for each model on each card."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.core.messages import plural
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, tell, under_way
from turbofit.core.units import format_duration
from turbofit.core.version import __version__
from turbofit.report.fit_site.choices import choices_of
from turbofit.report.fit_site.tables import PageDocument, rows, seconds_of, tables
from turbofit.report.page.html import policy, shared_script, stylesheet
from turbofit.report.page.tag import json_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.report.fit_site.choices import SiteChoices, SiteRequest
    from turbofit.report.fit_site.tables import PageRow

_FOLDER: Final = Path(__file__).parent
#: What people are told meanwhile.
_DOING: Final = "planning tables"
#: What the page's own script loads is the page's own; `'self'` means nothing of a local file.
_LOADS: Final = "'strict-dynamic'"


def write_site(
    request: SiteRequest, folder: Path, *, say: Callable[[str], None], jobs: int | None = None
) -> PageDocument:
    """Plan every point and write the site: `index.html`, and the tables beside it.

    Args:
        request: the choices that it offers.
        folder: where; it is made, and files of the same names are replaced.
        say: tells how long it will take, before it begins.
        jobs: processes beside each other; by default one for each CPU.

    Returns:
        All answers.

    Raises:
        UsageError: a model or a card is no preset, or a file cannot be written.
    """
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    choices = choices_of(request, created)
    every = len(choices.models) * len(choices.cards)
    processes = min(jobs or os.cpu_count() or 1, every)
    seconds = format_duration(max(10, round(seconds_of(choices, processes), -1)))
    where = f"{processes} {plural(processes, 'process')}"
    say(f"{choices.answers:,} plans for {folder}: about {seconds} with {where}")
    answers: list[PageRow] = []
    with under_way(_DOING):
        tell(Step(_DOING, 0, every))
        for done, table in enumerate(tables(choices, processes), 1):
            path = folder / "data" / table.model / f"{table.card}.js"
            _make(path.parent)
            write_atomic(path, table.to_script())
            answers += rows(choices, table)
            tell(Step(_DOING, done, every))
    write_atomic(folder / "index.html", index_page(choices))
    return PageDocument(turbofit_version=__version__, created=created, answers=tuple(answers))


def index_page(choices: SiteChoices) -> str:
    """The page alone.

    Args:
        choices: what its controls offer.
    """
    scripts = (_read(name) for name in ("wording.js", "answer.js", "site.js"))
    script = shared_script() + "".join(scripts)
    return Template(_read("index.html")).substitute(
        policy=policy(script, _LOADS),
        style=stylesheet() + _read("site.css"),
        script=script,
        choices=json_text(choices),
        version=choices.turbofit_version,
        created=choices.created,
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(
            f"{folder} cannot be made: {exc.strerror}", hint="name another folder with --out"
        ) from exc


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
