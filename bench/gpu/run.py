"""The stages of a run: which there are, which are done, and how long may be spent on them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["NotRunError", "Run"]

#: One document of a stage.
Found = dict[str, Any]


class NotRunError(Exception):
    """A stage that cannot be run here and now, and why; what it found so far is kept beside."""


class Run:
    """Runs stages in order, each until it went well, into a folder.

    Args:
        out: where their documents go.
        limit: seconds after which no stage begins.
        stages: letters of the stages that are wanted.
        only: a pattern that a stage's name must have somewhere.
    """

    def __init__(self, out: Path, limit: float, stages: str, only: str = "") -> None:
        self.out, self._only = out, re.compile(only)
        self._letters = stages.split(",")
        self._end = time.monotonic() + limit
        self.failed = False
        #: Stages without a document, and why.
        self.not_run: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    def wants(self, letter: str) -> bool:
        """Whether stages of this letter are asked for."""
        return letter in self._letters

    def stage(self, name: str, act: Callable[[], Found]) -> None:
        """Run one, unless it is not asked for or went well before.

        Whatever it raises is written down, and the next stage is run.
        """
        if not self._only.search(name):
            return
        file = self.out / f"{name}.json"
        if self.read(name) is not None:
            print(f"{name}: there already", flush=True)
            return
        if not self.left:
            self.not_run[name] = "time was over"
            print(f"{name}: not run: time was over", flush=True)
            return
        begun = time.monotonic()
        try:
            found = act()
        except NotRunError as exc:
            self.not_run[name] = str(exc)
            print(f"{name}: not run: {exc}", flush=True)
            return
        except Exception as exc:  # noqa: BLE001 - it must not end the stages after it
            found = {"code": None, "not_run": f"{type(exc).__name__}: {exc}"}
        found["seconds"] = round(time.monotonic() - begun, 1)
        if found.get("code") != 0:
            self.failed = True
            self.not_run[name] = str(found.get("not_run") or found.get("outcome") or found["code"])
        write(file, found)
        print(f"{name}: {told(found)} in {found['seconds']:.0f} s", flush=True)

    def steps(self, name: str) -> dict[str, str]:
        """What a stage that was cut short has found out, by its steps."""
        file = self.out / f"{name}.steps"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def keep(self, name: str, steps: dict[str, str]) -> None:
        """Keep the steps of a stage that is under way."""
        write(self.out / f"{name}.steps", steps)

    def read(self, name: str) -> Found | None:
        """The document of a stage that went well, None where there is none."""
        file = self.out / f"{name}.json"
        try:
            found: Found = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get("code") == 0 else None

    def close(self) -> None:
        """Write which stages were not run, and why."""
        file = self.out / "not-run.json"
        if self.not_run:
            write(file, self.not_run)
        else:
            file.unlink(missing_ok=True)


def write(file: Path, found: Any) -> None:
    """Whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.rename(file)


def told(found: Found) -> str:
    """One stage in a line."""
    if found.get("code") != 0:
        return f"failed ({found.get('not_run') or found.get('outcome') or found.get('code')})"
    said = [str(found["outcome"])] if found.get("outcome") else []
    if found.get("restarts"):
        said.append(f"{len(found['restarts'])} restarts")
    if found.get("over") is not None:
        said.append(f"forecast {found['over'] / 2**20:+,.0f} MiB over what NVML saw")
    if found.get("oracle") is not None:
        said.append(f"oracle {found['oracle']:.3f}, plan {found['plan']:.3f}")
    said += [
        f"{way} {found[way]['requests_per_second']:.2f} requests/s"
        for way in ("direct", "gateway")
        if way in found
    ]
    return ", ".join(said) or "done"
