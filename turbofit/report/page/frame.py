"""Puts a page together: one file, no network, nothing but its own script may run."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

from turbofit.report.page.tag import Markup, join, json_text, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["framed", "policy", "shared_script", "stylesheet", "tiles"]

_FOLDER: Final = Path(__file__).parent


def framed(
    *,
    title: str,
    head: Markup,
    sections: Sequence[tuple[str, str, Markup]],
    made: str,
    document: Any,
) -> str:
    """A whole page as HTML.

    Args:
        title: of the window.
        head: what stands above the contents.
        sections: id, title and content of each; empty ones are left out by who makes them.
        made: who made it, and when.
        document: the data that the page carries.
    """
    script = shared_script() + _read("page.js")
    links = [tag("li", tag("a", text, href=f"#{name}")) for name, text, _ in sections]
    return Template(_read("page.html")).substitute(
        title=tag("title", title),
        policy=policy(script),
        style=stylesheet(),
        script=script,
        head=head,
        contents=tag("ul", *links),
        body=join(*(_section(*one) for one in sections)),
        made=tag("p", made),
        json=json_text(document),
    )


def tiles(figures: Sequence[tuple[str, str, str]]) -> Markup:
    """The figures that people look for first: label, value and a line below it."""
    return tag(
        "div",
        *(
            tag("div", tag("span", label, class_="label"), tag("b", value), tag("small", text))
            for label, value, text in figures
        ),
        class_="tiles",
    )


def _section(name: str, title: str, content: Markup) -> Markup:
    return tag("section", tag("h2", title, id=f"{name}-title"), content, id=name,
               aria_labelledby=f"{name}-title")  # fmt: skip


def stylesheet() -> str:
    """The style of all pages."""
    return _read("page.css")


def shared_script() -> str:
    """What the scripts of all pages begin with."""
    return _read("shared.js")


def policy(script: str, *more: str) -> str:
    """The policy of a page that loads nothing, and runs this script alone.

    Args:
        script: the script.
        more: what scripts may do beside that, in the words of a Content-Security-Policy.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    may_run = " ".join((f"'sha256-{digest}'", *more))
    return (
        f"default-src 'none'; script-src {may_run}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
