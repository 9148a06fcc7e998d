"""What the checks of all SDKs share; plain Python, run in an environment without turbofit.

A check returns what it saw as one short line. Two servers are compared by these lines, so that
nothing which differs from run to run (ids, times, numbers of chunks) may be in one.
"""

from __future__ import annotations

import json
import struct
import sys
import urllib.request
import zlib
from base64 import b64encode
from collections.abc import Callable

QUESTION = "What is this?"
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def url() -> str:
    """The server's address, from the command line."""
    return sys.argv[1].rstrip("/")


def model() -> str:
    """The model's name there."""
    with urllib.request.urlopen(f"{url()}/v1/models", timeout=120) as answer:
        return str(json.load(answer)["data"][0]["id"])


def picture(width: int = 112, height: int = 84) -> str:
    """A grey PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width * 3) * height)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b64encode(file).decode()


def messages(images: int = 0) -> list[dict]:
    """A question in the OpenAI API's form, with so many images."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
    content = [{"type": "text", "text": QUESTION}, *[part] * images]
    return [{"role": "user", "content": content if images else QUESTION}]


def run(checks: dict[str, Callable[[], str]]) -> None:
    """Run all checks; one JSON line each: what was seen, or what was raised."""
    for name, check in checks.items():
        said = ""
        try:
            seen = check()
        except Exception as exc:  # noqa: BLE001 - what an SDK raises is what is compared
            status = getattr(exc, "status_code", None)
            seen = f"{type(exc).__name__}{f' {status}' if status else ''}"
            said = " ".join(str(exc).split())[:400]
        print(json.dumps({"check": name, "seen": seen, "said": said}), flush=True)
