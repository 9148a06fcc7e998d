"""The page at the address that `serve` prints: what is served, its limits, an example, the routes.

It runs no script, and whoever shows no key where one is needed learns only where to put it.
"""

from __future__ import annotations

import json
import re
import shlex
from html import escape
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.units import format_bytes
from turbofit.gateway.http.routes import ROUTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.gateway.limits.request_limits import Bounds

HEADERS: Final = (
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
#: Tokens of the example's answer at most: on pretend GPUs no answer ends by itself.
_ANSWER: Final = 50
_HOST: Final = re.compile(r"[\w.\-:\[\]]{1,255}")
_STYLE: Final = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;"
    "margin:2rem auto;padding:0 1rem}pre{overflow-x:auto;padding:.75rem;border:1px solid #8886;"
    "border-radius:6px}table{border-collapse:collapse}td{padding:.1rem 1.5rem .1rem 0}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:1.75rem}"
)


def is_page(raw_path: bytes) -> bool:
    """Whether a path is this page's: the address itself, or where other servers have their docs."""
    return raw_path.rstrip(b"/") in (b"", b"/docs")


def client_lines(url: str, model: str, *, key: bool) -> list[str]:
    """A line for a shell and one for Python that ask; they take a ``key`` from ``API_KEY``."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": model, "messages": messages, "max_tokens": _ANSWER}
    headers = ["-H 'Content-Type: application/json'"]
    if key:
        headers.append('-H "Authorization: Bearer $API_KEY"')
    secret = 'os.environ["API_KEY"]' if key else '"none"'
    return [
        f"curl {url}/v1/chat/completions {' '.join(headers)} -d {shlex.quote(json.dumps(body))}",
        f'openai.OpenAI(base_url="{url}/v1", api_key={secret}).chat.completions.create('
        f"model={json.dumps(model)}, messages={json.dumps(messages)}, max_tokens={_ANSWER})",
    ]


def limits_in_words(bounds: Bounds) -> list[str]:
    limits, rule = bounds.limits, bounds.rule
    words = [f"{bounds.longest_request_tokens:,} tokens: prompt, images and answer together"]
    if rule is None or limits.vision_unit is None:
        words.append("no images")
    else:
        count, most = limits.images_per_request, limits.most_images(rule)
        size = "" if limits.image_limit is None else f" of {limits.image_limit:,} {rule.limit_unit}"
        fewer = f", or {most} smaller ones" if most > count else ""
        larger = "; a larger image is made smaller" if size else ""
        words.append(f"{count} {plural(count, 'image')}{size}{fewer}{larger}")
    copies, beside = limits.copies(images=False), limits.copies(images=True)
    fewer = f", {beside} with images" if beside < copies and limits.vision_unit else ""
    words.append(f"{copies} {plural(copies, 'answer')} at once (n){fewer}")
    return [*words, f"a body of {format_bytes(limits.bytes_per_body)}"]


def welcome_page(
    scheme: str,
    host: str,
    models: Mapping[str, Sequence[str]] | None,
    *,
    key: bool,
    notices: Sequence[str] = (),
) -> bytes:
    """The page as HTML, with the ``notices`` first.

    ``models`` are the limits of each by its name, None for who shows no key; ``key`` says whether
    clients need one.
    """
    url = f"{scheme}://{host if _HOST.fullmatch(host) else 'HOST'}"
    if models is None:
        title = "turbofit: an API key is needed"
        parts = [
            f"<h1>{title}</h1><p>Send it in this header of each request:</p>"
            "<pre>Authorization: Bearer KEY</pre>"
        ]
    else:
        title = f"turbofit serves {', '.join(models) or 'a model'}"
        shell, python = client_lines(url, next(iter(models), "MODEL"), key=key)
        parts = [
            f"<h1>{escape(title)}</h1>",
            f"<h2>In a terminal</h2><pre>turbofit chat {escape(url)}</pre>",
            f"<h2>With curl</h2><pre>{escape(shell)}</pre>",
            f"<h2>In Python</h2><pre>{escape(python)}</pre>",
        ]
        for name, words in models.items():
            of = f" of {escape(name)}" if len(models) > 1 else ""
            items = "".join(f"<li>{escape(word)}</li>" for word in words)
            parts.append(f"<h2>Limits of a request{of}</h2><ul>{items}</ul>")
        parts.append("<h2>Routes</h2><table>")
        for path, route in ROUTES.items():
            shown = f'<a href="{path}">{path}</a>' if route.method == "GET" else path
            parts.append(f"<tr><td>{route.method}</td><td>{shown}</td></tr>")
        parts.append("</table>")
    parts[:0] = [f"<p><strong>{escape(notice)}</strong></p>" for notice in notices]
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><style>'
    )
    return f"{head}{_STYLE}</style></head><body>{''.join(parts)}</body></html>".encode()
