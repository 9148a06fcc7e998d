"""What clients send that no SDK does: ``python raw_http.py URL``. The standard library only."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

from common import messages, model, run, url

MODEL = model()
CHAT = "/v1/chat/completions"
FILE = "file:///usr/share/pixmaps/none.png"


def ask(method: str, path: str, body: object = None, **headers: str) -> str:
    parts = urlsplit(url())
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=300)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {**({"content-type": "application/json"} if data else {}), **headers}
    connection.request(method, path, data, {key.replace("_", "-"): sent[key] for key in sent})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return str(answer.status)


def chat(*content: object, role: str = "user", **fields: object) -> dict:
    said = [{"role": role, "content": list(content)}] if content else []
    return {"model": MODEL, "messages": [*said, *messages()], "max_tokens": 2, **fields}


PLAIN = json.dumps(chat()).encode()
TEXT = {"type": "text", "text": "x"}
run(
    {
        "a BOM before the body": lambda: ask("POST", CHAT, b"\xef\xbb\xbf" + PLAIN),
        "a body in UTF-16": lambda: ask("POST", CHAT, PLAIN.decode().encode("utf-16")),
        "a slash at the end of a path": lambda: ask("POST", CHAT + "/", chat()),
        "GET /health": lambda: ask("GET", "/health"),
        "HEAD /health": lambda: ask("HEAD", "/health"),
        "GET /metrics": lambda: ask("GET", "/metrics"),
        "/pooling": lambda: ask("POST", "/pooling", {"model": MODEL, "input": "x"}),
        "/get_ppl": lambda: ask("POST", "/get_ppl", {"input": "some words"}),
        "/is_sleeping": lambda: ask("GET", "/is_sleeping"),
        "an unknown route": lambda: ask("GET", "/v1/nothing"),
        "a wrong method": lambda: ask("DELETE", CHAT),
        "an unknown field": lambda: ask("POST", CHAT, chat(nothing=1)),
        "a null": lambda: ask("POST", CHAT, chat(temperature=None)),
        "a part of unknown type": lambda: ask("POST", CHAT, chat(TEXT, {"type": "file"})),
        "the same in an earlier answer": lambda: ask(
            "POST", CHAT, chat(TEXT, {"type": "thinking"}, role="assistant")
        ),
        "input_text": lambda: ask("POST", CHAT, chat({"type": "input_text", "text": "x"})),
        "an image of the server's disk": lambda: ask(
            "POST", CHAT, chat({"type": "image_url", "image_url": {"url": FILE}})
        ),
        "a web page": lambda: ask("POST", CHAT, chat(), origin="https://chat.example"),
        "no JSON": lambda: ask("POST", CHAT, b"{"),
        "text/plain": lambda: ask("POST", CHAT, PLAIN, content_type="text/plain"),
    }
)
