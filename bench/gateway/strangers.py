"""Clients without a key that hold the gateway up, one way after the other, and what others notice.

    python -m bench.gateway.hostile URL --strangers all [--pid GATEWAY]
    python -m bench.gateway.hostile URL --strangers endless_header slow_loris

While each goes on, a process apart asks for /health over a fresh connection each time, and another
client sends completions. Raw sockets: a library would keep to the rules.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bench.page import table
from bench.proc import resident_mib
from tests.support.gateway import CHAT, chat

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Iterable
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Event

HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
#: A way is given up after so long, and what is open then counts as staying.
SECONDS = 130.0
AGAIN = 10.0


def watch(
    url: str, headers: dict[str, str], body: bytes | None, end: Event, out: Connection
) -> None:
    """Ask again and again over fresh connections; say so after the first, tell all at the end."""
    parts = urlsplit(url)
    took: list[float] = []
    answers: Counter[str] = Counter()
    while not end.is_set():
        began = time.perf_counter()
        try:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
            connection.request("GET" if body is None else "POST", parts.path, body, headers)
            response = connection.getresponse()
            response.read()
            answers[str(response.status)] += 1
            connection.close()
        except OSError as exc:
            answers[type(exc).__name__] += 1
        took.append(time.perf_counter() - began)
        if len(took) == 1:
            out.send("asked once")
        end.wait(0.02)
    out.send((took, answers))


class Watched:
    """A process that runs `watch` while a block lasts; afterwards ``took`` and ``answers``."""

    def __init__(self, url: str, headers: dict[str, str], body: bytes | None = None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._end, (self._mine, theirs) = spawn.Event(), spawn.Pipe()
        self._process = spawn.Process(target=watch, args=(url, headers, body, self._end, theirs))
        self.took: list[float] = []
        self.answers: Counter[str] = Counter()

    def __enter__(self) -> Watched:
        self._process.start()
        self._mine.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.took, self.answers = self._mine.recv()
        self._process.join()


class Strangers:
    """The ways, each a coroutine that returns how its connections ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.url = args, args.url.rstrip("/")
        parts = urlsplit(self.url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.key = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
        self.offences: list[str] = []
        #: Connections that are opened at the same moment.
        self.opening = asyncio.Semaphore(50)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def ended(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """The status of the answer, or how it ended without one."""
        try:
            head = await asyncio.wait_for(reader.read(1 << 16), SECONDS)
        except asyncio.TimeoutError:
            return "stays"
        except OSError:
            return "reset"
        finally:
            writer.transport.abort()
        return head.split(b" ", 2)[1].decode() if head else "closed"

    async def one(self, *parts: bytes) -> Counter[str]:
        """One connection that sends this, as fast as it is taken."""
        reader, writer = await self.open()
        ended = asyncio.ensure_future(self.ended(reader, writer))
        with suppress(OSError):
            for part in parts:
                if ended.done():
                    break
                writer.write(part)
                await asyncio.wait_for(writer.drain(), SECONDS)
        return Counter([await ended])

    async def many(self, count: int, beginning: bytes, drip: bytes = b"") -> Counter[str]:
        """So many connections that begin, and then stop, or send a little each second."""

        async def stranger() -> str:
            async with self.opening:
                reader, writer = await self.open()
                writer.write(beginning)
            ended = asyncio.ensure_future(self.ended(reader, writer))
            while drip and not ended.done():
                await asyncio.wait((ended,), timeout=1.0)
                with suppress(OSError):
                    writer.write(drip)
            return await ended

        return await together(stranger() for _ in range(count))

    async def again(self, *parts: bytes) -> Counter[str]:
        """One connection after the other, for some seconds."""
        found: Counter[str] = Counter()
        ends = time.monotonic() + AGAIN
        while time.monotonic() < ends:
            found += await self.one(*parts)
        return found

    async def nobody(self) -> Counter[str]:
        """Nothing, to compare with."""
        await asyncio.sleep(AGAIN)
        return Counter()

    async def endless_header(self) -> Counter[str]:
        """A header without an end, again and again for 10 s."""
        return await self.again(HEAD.encode() + b"x: ", *[b"a" * (1 << 20)] * 512)

    async def big_header(self) -> Counter[str]:
        """A header of 5 MB, again and again for 10 s."""
        return await self.again(HEAD.encode() + b"x: ", *[b"a" * 50_000] * 100, b"\r\n\r\n")

    async def many_headers(self) -> Counter[str]:
        """5,000 headers, again and again for 10 s."""
        lines = b"".join(b"x-%d: a\r\n" % number for number in range(5000))
        return await self.again(HEAD.encode() + lines + b"\r\n")

    async def half_open(self) -> Counter[str]:
        """1,000 connections that stop in mid-header."""
        return await self.many(1000, HEAD.encode() + b"x: a")

    async def silent(self) -> Counter[str]:
        """1,000 connections that send nothing."""
        return await self.many(1000, b"")

    async def idle(self) -> Counter[str]:
        """1,000 connections that ask once, and stay."""

        async def stranger() -> str:
            async with self.opening:
                reader, writer = await self.open()
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                await reader.readuntil(b"}")
            return await self.ended(reader, writer)

        return await together(stranger() for _ in range(1000))

    async def slow_loris(self) -> Counter[str]:
        """2,000 connections that send a header each second."""
        return await self.many(2000, HEAD.encode(), b"x: a\r\n")

    async def slow_body(self) -> Counter[str]:
        """100 bodies that bring ten bytes a second."""
        return await self.many(100, self.posting(1 << 20), b"          ")

    async def unfinished(self) -> Counter[str]:
        """Nine bodies of which the last megabytes never come."""
        size = 48_900_000
        parts = [self.posting(size), *[b" " * (1 << 20)] * (size * 93 // 100 >> 20)]
        found = await asyncio.gather(*(self.one(*parts) for _ in range(9)))
        return sum(found, Counter())

    def posting(self, size: int) -> bytes:
        """Headers of a body, with a key where there is one: without, no body is read."""
        key = "".join(f"{name}: {value}\r\n" for name, value in self.key.items())
        return f"{HEAD}{key}content-length: {size}\r\n\r\n".encode()

    async def run(self) -> str:
        """Each way, while others ask, as a row of the table."""
        names = self.args.strangers
        rows = [await self.cells(name) for name in (WAYS if "all" in names else names)]
        return table(
            "what strangers send | over after | how their connections ended"
            " | /health, median / 99 % / slowest | /health | another client | memory, MiB",
            rows,
        )

    async def cells(self, name: str) -> tuple[str, ...]:
        way: Callable[[], Awaitable[Counter[str]]] = getattr(self, name)
        headers = {"content-type": "application/json", **self.key}
        body = json.dumps({**chat(), "max_tokens": 1}).encode()
        with (
            Watched(self.url + "/health", {}) as health,
            Watched(self.url + CHAT, headers, body) as other,
        ):
            began, memory = time.monotonic(), [self.memory()]
            follow = asyncio.ensure_future(self.follow(memory))
            ends = await way()
            took = time.monotonic() - began
            follow.cancel()
        waits = sorted(health.took)
        middle, late, slowest = (
            waits[min(len(waits) - 1, int(len(waits) * part))] * 1e3 for part in (0.5, 0.99, 1.0)
        )
        if late >= 100 or set(health.answers) != {"200"} or set(other.answers) != {"200"}:
            self.offences.append(name)
        return (
            way.__doc__ or "", f"{took:.1f} s", counted(ends),
            f"{middle:.0f} / {late:.0f} / {slowest:.0f} ms", counted(health.answers),
            counted(other.answers), f"{memory[0]:.0f} → {max(memory):.0f}",
        )  # fmt: skip

    def memory(self) -> float:
        """MiB of the gateway; 0 where its number was not given."""
        return resident_mib(self.args.pid) if self.args.pid else 0.0

    async def follow(self, memory: list[float]) -> None:
        while True:
            await asyncio.sleep(0.2)
            memory.append(self.memory())


def counted(found: Counter[str]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(found.items()))


async def together(ways: Iterable[Awaitable[str]]) -> Counter[str]:
    """How many ended how."""
    found = await asyncio.gather(*ways, return_exceptions=True)
    return Counter(one if isinstance(one, str) else type(one).__name__ for one in found)


WAYS = (
    "nobody", "endless_header", "big_header", "many_headers", "half_open", "silent", "idle",
    "slow_loris", "slow_body", "unfinished",
)  # fmt: skip
