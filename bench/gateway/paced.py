"""An upstream that is paced like a GPU and costs next to nothing itself.

It sends the first token after 200 ms, then one every 20 ms, as LMDeploy streams them. It is a raw
asyncio protocol, since the cost of a web framework would be measured with the gateway.

    python -m bench.gateway.paced --port 9001 --tokens 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":" token"},"finish_reason":null}]}\n\n'
)
_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
    }
).encode()
#: Bytes of a request that are looked at, at its beginning and at its end.
_KEPT = 1 << 12
_MODELS = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()


class Paced(asyncio.Protocol):
    """A connection; its requests are answered one after the other."""

    tokens, first, each = 50, 0.2, 0.02

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.data = bytearray()
        self.need = -1
        self.begin = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.need < 0:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.data[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            self.need, self.begin = end + 4 + length, bytes(self.data[:_KEPT])
        if len(self.data) >= self.need:
            body = self.begin + self.data[: self.need][-_KEPT:]
            del self.data[: self.need]
            self.need = -1
            self.task = asyncio.ensure_future(self.answer(body))
        elif len(self.data) > 2 * _KEPT:
            # Megabytes of a picture would cost more to keep than the gateway takes for them.
            self.need -= len(self.data) - _KEPT
            del self.data[:-_KEPT]

    async def answer(self, body: bytes) -> None:
        if body.startswith(b"GET "):
            self.whole(_MODELS if b"/v1/models" in body[:40] else b"{}")
            return
        began = time.perf_counter()
        if b'"stream":true' not in body and b'"stream": true' not in body:
            await asyncio.sleep(self.first)
            self.whole(_ANSWER)
            return
        await asyncio.sleep(self.first)
        write = self.transport.write
        write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        chunk = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
        for number in range(self.tokens):
            wait = began + self.first + number * self.each - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if self.transport.is_closing():
                return
            write(chunk)
        end = b"data: [DONE]\n\n"
        write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))

    def whole(self, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (len(body), body)
        )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.paced", description=__doc__)
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--first", type=float, default=0.2)
    parser.add_argument("--each", type=float, default=0.02)
    args = parser.parse_args()
    Paced.tokens, Paced.first, Paced.each = args.tokens, args.first, args.each
    server = await asyncio.get_running_loop().create_server(
        Paced, "127.0.0.1", args.port, backlog=2048
    )
    print(f"http://127.0.0.1:{args.port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
