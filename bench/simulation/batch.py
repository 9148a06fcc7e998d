"""`turbofit batch` in a simulated day: killed, stopped, and run again until it is complete."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from bench.simulation.loop import VirtualLoop
from bench.simulation.scheduler import Process
from turbofit.batch.batch_job import BatchJob, BatchListener
from turbofit.batch.batch_spec import BatchSpec, BatchTarget
from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from bench.simulation.world import World

__all__ = ["Batch"]

#: Seconds until somebody runs it again, at most.
_AGAIN = 600.0
#: A run is killed or stopped within so many, if it is.
_CUT = 120.0
#: How an item may fail that ends no engine: by a server that answers 500 to all, or breaks off.
_FAILURES = ("status_500", "connection_lost")


class Batch:
    """One input and its output.

    Args:
        world: where it runs.
        rng: decides what it asks, and when it is cut off.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self._input, self._output = world.folder / "items.jsonl", world.folder / "lines.jsonl"
        self._at_once = rng.choice((1, 4, 16))
        #: The text of each item by its name.
        self._items = {f"n{number}": f"item {number}" for number in range(rng.randrange(10, 60))}
        for number in range(rng.choice((0, 0, 1, 2))):
            self._items[f"p{number}"] = f"poison {rng.random()}"
        tokens = rng.choice((3, 100, 500))
        self._input.write_bytes(b"".join(_line(name, tokens, self._items[name])
                                         for name in sorted(self._items, key=_mixed)))  # fmt: skip
        self._process: Process | None = None
        self._job: BatchJob | None = None
        self._loop: VirtualLoop | None = None
        self.complete = False

    def start(self) -> None:
        """Run the command, perhaps again."""
        world, rng = self._world, self._rng
        self._process = process = Process(world.new_pid(), world.scheduler.skew)
        world.machine.names[process.pid] = "turbofit"
        world.trace(f"batch {process.pid} starts")
        world.scheduler.thread(partial(self._run, process), process)
        cut = rng.choice((None, None, self._kill, self._tear, self._stop))
        if cut is not None:
            world.scheduler.after(rng.uniform(0.0, _CUT), partial(cut, process))

    def check(self) -> None:
        """Each item has its line, once, and an answer in it where its request ends no engine."""
        violate = self._world.violate
        if not self.complete:
            violate("a batch is not complete two hours after the last fault")
            return
        raw = self._output.read_bytes()
        try:
            lines = [msgspec.json.decode(one) for one in raw.splitlines()]
        except msgspec.DecodeError as exc:
            violate(f"a batch wrote a line that cannot be read: {exc}")
            return
        times = Counter(one["custom_id"] for one in lines)
        if times != Counter(self._items.keys()) or not raw.endswith(b"\n"):
            violate(f"a batch of {len(self._items)} items wrote {times}")
        for one in lines:
            error = one.get("error")
            code = error["code"] if error is not None else ""
            text = self._items.get(one["custom_id"], "")
            kills = text.startswith("poison")
            chance = code == "convicted" and text in self._world.invariants.accused_by_chance
            excused = chance or code in _FAILURES
            if (kills and not code) or (code and not kills and not excused):
                violate(f"{one['custom_id']} of a batch ended with {error}")

    def _run(self, process: Process) -> None:
        world = self._world
        self._loop = loop = VirtualLoop(world)
        loop.set_exception_handler(self._bug)
        target = BatchTarget(url="http://127.0.0.1:23333", at_once=self._at_once)
        said = ""
        try:
            self._job = BatchJob((self._input, self._output), BatchSpec(), target, BatchListener())
            result = loop.run_until_complete(self._job.run())
            self.complete = not result.left
            said = f"{result.answered} answers, {result.failed} failures, {result.left} left"
        except TurbofitError as exc:
            said = f"error: {exc.message} | {exc.hint}"
            if not exc.hint:
                world.violate(f"an error without a hint: {exc.message}")
        finally:
            loop.close()
        world.trace(f"batch {process.pid} ends: {said}")
        if process.descriptors:
            world.violate(f"batch {process.pid} leaves {len(process.descriptors)} files open")
        self._ended(process, "by itself")

    def _ended(self, process: Process, how: str) -> None:
        world = self._world
        world.count(f"batch ended {how}")
        world.end(process)
        for connection in list(world.port.connections):
            if connection.loop is self._loop:
                world.port.connections.remove(connection)
                connection.reset()
        if not self.complete:
            world.scheduler.after(self._rng.uniform(1.0, _AGAIN), self.start)

    def _kill(self, process: Process) -> None:
        """SIGKILL."""
        if process.alive:
            self._world.trace(f"batch {process.pid} is killed")
            self._ended(process, "by SIGKILL")

    def _tear(self, process: Process) -> None:
        """SIGKILL in the middle of its next write."""
        process.torn = partial(self._kill, process)

    def _stop(self, process: Process) -> None:
        """SIGINT."""
        if process.alive and self._job is not None and self._loop is not None:
            self._world.trace(f"SIGINT to batch {process.pid}")
            self._loop.call_soon_threadsafe(self._job.stop)

    def _bug(self, _: Any, context: dict[str, Any]) -> None:
        self._world.violate(
            f"a batch's loop: {context.get('message')} {context.get('exception')!r}"
        )


def _mixed(name: str) -> str:
    """An order in which those that end engines stand between others."""
    return name[::-1]


def _line(name: str, tokens: int, text: str) -> bytes:
    content = [{"type": "text", "text": f"#{text}#"}]
    body = {
        "model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": tokens
    }  # fmt: skip
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return msgspec.json.encode(line) + b"\n"
