"""A paced server whose answer is the request's text, so that an answer shows whose it is.

python -m bench.batch.echo --port 9401 --first 0.05
"""

from __future__ import annotations

import argparse
import asyncio
import json

from bench.gateway.paced import Paced


class Echo(Paced):
    """One connection."""

    async def answer(self, body: bytes) -> None:
        if body.startswith(b"GET "):
            await super().answer(body)
            return
        incoming = json.loads(body.partition(b"\r\n\r\n")[2])
        if self.first:
            await asyncio.sleep(self.first)
        message = {"role": "assistant", "content": incoming["messages"][0]["content"]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if not self.transport.is_closing():
            self.whole(json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.batch.echo", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--first", type=float, default=0.05, help="seconds of an answer")
    arguments = parser.parse_args()
    Echo.first = arguments.first
    server = await asyncio.get_running_loop().create_server(
        Echo, "127.0.0.1", arguments.port, backlog=2048
    )
    print(f"http://127.0.0.1:{arguments.port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
