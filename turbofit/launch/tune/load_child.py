"""The load of a trial, in a process of its own, which tells how far it is.

Beside the gateway, in its process, the load would wait for the gateway's interpreter lock, and
measure that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.errors import TurbofitError
from turbofit.core.process.progress import Step, tell
from turbofit.load.result import LoadResult
from turbofit.load.spec import LoadSpec

if TYPE_CHECKING:
    from turbofit.load.driver import LoadRun

_PATIENCE: Final = 10.0
_SHOWN: Final = 300


class LoadChild:
    """One load at a gateway.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, url: str, key: str, spec: LoadSpec) -> None:
        #: The result or the error, and the last line that is neither, nor a step.
        self._said = self._erred = b""
        #: The beginning of a line.
        self._begun = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, url, spec.model_dump_json(exclude_unset=True)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "TURBOFIT_API_KEY": key},
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )  # fmt: skip
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def look(self) -> bool:
        """Tell how far it is; whether it has ended."""
        ended = self._process.poll() is not None
        assert self._process.stdout is not None
        *lines, self._begun = (self._begun + (self._process.stdout.read() or b"")).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self._said = line
            elif line.startswith(b"["):
                with suppress(msgspec.DecodeError):
                    tell(msgspec.json.decode(line, type=Step))
            else:
                self._erred = line
        if ended:
            self._process.stdout.close()
        return ended

    def interrupt(self) -> bool:
        """Have it end with what it has measured; whether it runs."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        return self._process.returncode is None

    def end(self) -> None:
        """Stop it where it runs, and take what it has measured."""
        for number in (signal.SIGINT, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE)
                break
        self.look()

    @property
    def result(self) -> LoadResult | None:
        """What it measured; None where it measured nothing."""
        try:
            return msgspec.json.decode(self._said, type=LoadResult)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    @property
    def why(self) -> str:
        try:
            error: Any = msgspec.json.decode(self._said)["error"]["message"]
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
            error = self._erred.decode(errors="replace").strip()
        return str(error)[-_SHOWN:] or f"the load ended with {self._process.returncode}"


def _main(url: str, spec: str) -> None:
    """Drive the load of the words: a line each second, and the result or the error as the last."""
    from turbofit.core.process.variables import variables
    from turbofit.load.bench import bench

    def tick(run: LoadRun) -> None:
        _print(run.step())

    try:
        key = variables().api_key or None
        load = LoadSpec.model_validate_json(spec, strict=False)
        _print(bench(url, load, key=key, tick=tick))
    except TurbofitError as exc:
        _print(exc.to_dict())


def _print(document: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(document) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _main(*sys.argv[1:])
