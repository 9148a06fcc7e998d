"""A server without LMDeploy: the stand-in engine's lines, and a few routes of the standard library.

It is for tests of our own process handling, where a second of start-up matters. ``STANDIN_SCRIPT``
says what it does, as in `standin_engine`; ``deaf`` ignores SIGTERM and SIGINT, ``slow_image``
answers no chat, ``slow`` never starts, ``dies_later`` runs out of memory at SIGUSR1,
``dies_of_poison`` aborts at a request with this word. Of a list by commas each start takes the next
one, counted in the file ``STANDIN_COUNT``. A token takes ``STANDIN_PACE`` seconds; each one is the
last message, which the file ``STANDIN_SEEN`` notes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standin_engine import StandInEngine, abort_out_of_memory

#: Nobody sets it.
NEVER = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """Health, models and chat."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health and models."""
        self.answer({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        """Any chat."""
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(raw)
        if SCRIPT == "dies_of_poison" and b"poison" in raw:
            os.abort()
        if SCRIPT == "oom_image":
            abort_out_of_memory(SCRIPT)
        if SCRIPT == "slow_image":
            NEVER.wait()
        if SCRIPT == "refuses":
            self.send_error(500, "no")
            return
        tokens, said = asked.get("max_tokens", 1), asked.get("messages", [{}])[-1].get("content")
        if SEEN:
            with open(SEEN, "a", encoding="utf-8") as file:
                file.write(f"{said}\n")
        if asked.get("stream"):
            self.stream(tokens, said)
            return
        time.sleep(PACE * tokens)
        choices = [{"index": 0, "message": {"content": f"{said}" * tokens}}]
        self.answer({"choices": choices, "usage": {"completion_tokens": tokens}})

    def stream(self, tokens: int, said: object) -> None:
        """One event a token."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        # As LMDeploy's server: who reads sees whether the answer ended or was cut.
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        said = json.dumps({"choices": [{"index": 0, "delta": {"content": said}}]})
        for event in (*[said] * tokens, "[DONE]", ""):
            time.sleep(PACE * (event == said))
            data = f"data: {event}\n\n".encode() if event else b""
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def answer(self, document: dict) -> None:
        """One JSON document."""
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def this_start() -> str:
    """What this start does: of a list by commas the one for its number, the last one for ever."""
    scripts = os.environ.get("STANDIN_SCRIPT", "serve").split(",")
    count = os.environ.get("STANDIN_COUNT")
    if not count:
        return scripts[0]
    with open(count, "a+", encoding="utf-8") as file:
        file.write("x")
        file.flush()
        file.seek(0)
        number = len(file.read())
    return scripts[min(number, len(scripts)) - 1]


def option(name: str) -> str:
    """The value of one option."""
    return sys.argv[sys.argv.index(name) + 1]


PACE = float(os.environ.get("STANDIN_PACE", "0"))
SEEN = os.environ.get("STANDIN_SEEN")
SCRIPT = this_start()
os.environ["STANDIN_SCRIPT"] = SCRIPT
if SCRIPT == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if SCRIPT == "slow":
    NEVER.wait()
if SCRIPT == "fallback":
    text = "Fallback to pytorch engine because turbomind is not built."
    os.write(2, f"2026-11-20 08:30:01,123 - lmdeploy - WARNING - archs.py:38 - {text}\n".encode())
    NEVER.wait()
StandInEngine(
    "tiny",
    types.SimpleNamespace(
        cache_max_entry_count=float(option("--cache-max-entry-count")),
        max_prefill_token_num=int(option("--max-prefill-token-num")),
        max_batch_size=int(option("--max-batch-size")),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    ),
)
ThreadingHTTPServer.request_queue_size = 128
server = ThreadingHTTPServer(("127.0.0.1", int(option("--server-port"))), Handler)
if SCRIPT == "dies_later":
    signal.signal(signal.SIGUSR1, lambda *_: abort_out_of_memory("oom_image"))
os.write(1, b"INFO:     Uvicorn running on http://127.0.0.1\n")
server.serve_forever()
