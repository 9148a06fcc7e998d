"""HTML and SVG from Python: text that is not markup is escaped."""

from __future__ import annotations

import html
import json
from typing import Any, Final

from turbofit.core.struct import to_builtins

#: Control characters, and those that reverse the direction of text: names are not trusted.
_UNSAFE: Final = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F),
     *range(0x2066, 0x206A)), "?"
)  # fmt: skip
_VOID: Final = {"meta", "line", "rect", "path", "circle", "br", "input"}
#: What would end a script element, or a line of JavaScript.
_IN_SCRIPT: Final = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Markup(str):
    """Text that is markup: it is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """An element; ``class_`` and ``data_x`` become ``class`` and ``data-x``.

    Attributes that are None or False are left out, True stands without a value.
    """
    pieces = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        pieces.append(plain if value is True else f'{plain}="{_escaped(str(value))}"')
    head = " ".join(pieces)
    if name in _VOID and not children:
        return Markup(f"<{head}/>")
    return Markup(f"<{head}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children behind each other."""
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def json_text(value: Any) -> Markup:
    """A value as JSON that can stand in a script element."""
    text = json.dumps(to_builtins(value), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_IN_SCRIPT))


def scrolled(content: Markup, what: str) -> Markup:
    """A box for what may be wider than the page; by keyboard too."""
    label = f"{what}; scrolls where it is wider than the page"
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=label)


def _escaped(text: str) -> str:
    return html.escape(text.translate(_UNSAFE), quote=True)
