"""Runs turbofit's command lines in this process, and makes comparable documents of them."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.golden.cases import Case
from bench.golden.inputs import write_inputs

#: Of the caller's environment; all else that a plan could depend on is set below.
_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")
#: What `doctor` finds out of --on alone; the rest is of the machine that it runs on.
_OF_THE_SPEC = frozenset({
    "gpus", "cuda_visible_devices", "free_memory", "mig", "holders", "peer_access",
})  # fmt: skip
_VERSION = re.compile(r'("turbofit_version":\s*"|\bturbofit v?)\d+\.\d+[\w.+-]*')
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?")


#: The checkout, whose scripts hints name.
ROOT = Path(__file__).resolve().parents[2]


class Answer(NamedTuple):
    """Exit code, standard output and standard error of one command line."""

    code: int
    out: str
    err: str


class Workplace:
    """The current folder with the inputs, in which the turbofit on `sys.path` runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        self._environment |= {
            "HOME": str(folder), "LC_ALL": "C.UTF-8", "TZ": "UTC", "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "no-hub"), "MODELSCOPE_CACHE": str(folder / "no-hub"),
            "XDG_STATE_HOME": str(folder / "state"), "XDG_CACHE_HOME": str(folder / "cache"),
            "TURBOFIT_LEASES": str(folder / "leases"), "NO_COLOR": "1", "COLUMNS": "80",
        }  # fmt: skip
        write_inputs(folder, lambda words: self.answer(words).out)

    def document(self, case: Case) -> str:
        """Return the document of a case: name, exit code, standard output and error, normalised."""
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        for line in case.before:
            self.answer(shlex.split(line))
        said = self.answer(shlex.split(case.line), dict(case.env))
        code, out = str(said.code), said.out
        if case.group == "doctor":
            code, out = "not compared", _of_the_spec(out)
        text = f"$ {case.name}\nexit code: {code}\n--- stdout\n{out}--- stderr\n{said.err}"
        return self._normalised(text)

    def answer(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> Answer:
        """Run ``python -m turbofit WORDS`` in this process; returns its output."""
        streams = {name: _stream() for name in ("stdin", "stdout", "stderr")}
        before = {name: getattr(sys, name) for name in ("argv", *streams)}
        environ = dict(os.environ)
        os.environ.clear()
        os.environ.update({**self._environment, **(env or {})})
        sys.argv = ["turbofit", *words]
        for name, stream in streams.items():
            setattr(sys, name, stream)
        try:
            runpy.run_module("turbofit", run_name="__main__")
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        finally:
            for name, value in before.items():
                setattr(sys, name, value)
            os.environ.clear()
            os.environ.update(environ)
        return Answer(code, _text(streams["stdout"]), _text(streams["stderr"]))

    def _normalised(self, text: str) -> str:
        """Replace times, turbofit's version and the folder's path by fixed words."""
        text = text.replace(str(self.folder), "WORK").replace(str(ROOT), "CHECKOUT")
        return _TIME.sub("TIME", _VERSION.sub(r"\1VERSION", text))


@contextmanager
def workplace() -> Iterator[Workplace]:
    """Yield a `Workplace` in a folder of its own, which is removed afterwards."""
    here = Path.cwd()
    # What takes a second on a busy machine would tell so on stderr; by its name here, and by that
    # in an older turbofit, which may have none.
    for module in ("screen", "progress_display"):
        with suppress(ModuleNotFoundError):
            importlib.import_module(f"turbofit.cli.terminal.{module}")._PATIENCE = math.inf
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        try:
            yield Workplace(folder)
        finally:
            os.chdir(here)


def _of_the_spec(out: str) -> str:
    """Reduce `doctor`'s document to findings that do not depend on this machine; keep others."""
    try:
        document = json.loads(out)
        kept = [one for one in document["findings"] if one["check"] in _OF_THE_SPEC]
    except (ValueError, KeyError):
        return out
    return json.dumps({**document, "findings": kept}, indent=2) + "\n"


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("utf-8", "replace")
