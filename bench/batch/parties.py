"""Inputs, the stand-in server and the client of the batch bench, each a process that may die."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common.processes import HANG, free_port


def write_input(path: Path, count: int) -> Path:
    """An input of so many short requests."""
    with path.open("w") as file:
        for number in range(count):
            messages = [{"role": "user", "content": f"question {number}"}]
            body = {"model": "m", "messages": messages, "max_tokens": 16}
            line = {
                "custom_id": f"request-{number:08}", "method": "POST",
                "url": "/v1/chat/completions", "body": body,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    return path


class Server:
    """The echo on a port of its own; it can be killed and started again there."""

    def __init__(self, first: float) -> None:
        self.port, self._first = free_port(), first
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "bench.batch.echo", "--port", str(self.port),
                "--first", str(self._first),
            ],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Client:
    """``turbofit batch``, and the most memory that it had."""

    def __init__(self, source: Path, output: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "turbofit", "batch", str(source), str(output), *options,
                "--json",
            ],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.peak = 0

    def look(self) -> bool:
        """Whether it runs; its peak is known after."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            status = ""
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                self.peak = max(self.peak, int(line.split()[1]) << 10)
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def result(self) -> dict[str, Any]:
        """What it says at its end."""
        out, _ = self._process.communicate(timeout=HANG)
        assert self._process.returncode == 0, self._process.returncode
        return dict(json.loads(out))


def missing_and_doubled(output: Path, count: int) -> tuple[int, int, int]:
    """Items without a line, lines too many, and answers that are another item's."""
    seen, strange = Counter[str](), 0
    with output.open() as file:
        for text in file:
            line = json.loads(text)
            seen[line["custom_id"]] += 1
            number = int(line["custom_id"].rpartition("-")[2])
            said = line["response"]["body"]["choices"][0]["message"]["content"]
            strange += said != f"question {number}" or line["error"] is not None
    return count - len(seen), sum(seen.values()) - len(seen), strange
