"""Rehearsals of TurboMind that begin in a process in which torch and LMDeploy are imported.

Imports are half of a small rehearsal. The server imports once, touches no card, and forks a child
for each rehearsal, which does what ``turbofit.rehearse.turbomind.child`` does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from turbofit.pretend.build import build
from turbofit.pretend.documents import dumped
from turbofit.pretend.scenario_file import write_scenario
from turbofit.rehearse.turbomind.notes import read_notes
from turbofit.rehearse.turbomind.run import child_environment
from turbofit.rehearse.turbomind.spec import Spec

#: Seconds after which a rehearsal hangs: whole ones take three on this machine when it is idle.
BOUND = 90.0


@dataclass
class Life:
    """A rehearsal that has ended.

    Attributes:
        status: its exit status, negative for a signal; None: it hung and was killed.
        report: what the child told.
        log: what the engine printed.
        timeline: where its timeline is.
    """

    status: int | None
    report: dict[str, Any]
    log: bytes
    timeline: Path


class ForkServer:
    """A context manager: the process in which all is imported."""

    def __enter__(self) -> ForkServer:
        self.libraries = build()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.faults.forkserver"],
            env=child_environment(self.libraries, Path("/nonexistent")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._answer(4 * BOUND) == {"imported": True}  # on a machine that others use
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def begin(self, spec: Spec, folder: Path, shared: str = "", *, stay: bool = False) -> int:
        """Fork a child for a rehearsal in a folder; its process.

        With ``stay`` it does not end: the file ``staying`` in the folder tells that it has served.
        """
        write_scenario(folder / "scenario", spec.machine, str(folder / "timeline"), shared)
        (folder / "spec.json").write_text(dumped(spec), encoding="utf-8")
        job = {"folder": str(folder), "libraries": str(self.libraries), "stay": stay}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._answer(BOUND)["pid"])

    def run(self, spec: Spec, folder: Path, shared: str = "") -> Life:
        """A whole rehearsal; one that takes longer than the bound is killed."""
        pid = self.begin(spec, folder, shared)
        ended = self._answer(BOUND)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
            self._answer(BOUND)
        log = (folder / "stderr").read_bytes()
        return Life(ended.get("status"), read_notes(folder), log, folder / "timeline")

    def _answer(self, seconds: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            return {}
        found: dict[str, Any] = json.loads(out.readline())
        return found


def _say(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def _child(job: dict[str, Any]) -> None:
    """The rehearsal itself; does not return."""
    os.setsid()
    folder = Path(job["folder"])
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
    os.chdir(folder)
    os.environ["TURBOFIT_PRETEND_SCENARIO"] = str(folder / "scenario")
    from turbofit.rehearse.turbomind import child

    def wait(_: int) -> NoReturn:
        (folder / "staying").touch()
        while True:
            signal.pause()

    if job["stay"]:
        child.leave = wait
    files = [str(folder / "spec.json"), str(folder / "report.json"), job["libraries"]]
    child.main([*files, str(os.getppid())])


def main() -> int:
    """The server: a line of JSON a rehearsal; its process, and later its status, come back."""
    import torch

    if torch.version.cuda is None:
        from turbofit.rehearse.turbomind import shims

        shims.declare_torchvision()
        shims.declare_torchvision = lambda: None  # once in a process and its children
    # Not lmdeploy.turbomind: its library asks CUDA for devices when it is loaded.
    import lmdeploy.archs
    import lmdeploy.model
    import lmdeploy.tokenizer
    import lmdeploy.utils  # noqa: F401
    import transformers.models.auto  # noqa: F401

    _say(imported=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        _say(pid=pid)
        _, status = os.waitpid(pid, 0)
        _say(status=os.waitstatus_to_exitcode(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
