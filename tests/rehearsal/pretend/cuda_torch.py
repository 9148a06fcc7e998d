"""Programs on a CUDA build of torch, run by ``turbofit pretend`` as a user would run them.

The build lies in a folder that ``TURBOFIT_CUDA_PATH`` names (scripts/check makes one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import CUDA_PATH
from tests.support.processes import REPO as ROOT
from turbofit.core.struct import to_json
from turbofit.rehearsal.spec import Spec

PATH = f"{CUDA_PATH}:{ROOT}"
_MARK = "RESULT "
HEAD = f"""
import json, sys, torch
def result(value): print({_MARK!r} + json.dumps(value), flush=True)
MIB = 1 << 20
"""


@dataclass(frozen=True)
class Ran:
    """How a program ended: exit code, what it told, what it printed, and turbofit's report."""

    code: int
    result: Any
    text: str
    report: dict[str, Any]


def run(
    folder: Path, program: str, *given: str, on: str = "1xrtx3090", seconds: float = 600.0,
    **env: str,
) -> Ran:  # fmt: skip
    """Run a program, torch imported, that calls ``result`` with what it found.

    It is given words and written into ``folder``, where nothing may shadow a module, and killed
    after ``seconds``.
    """
    folder.mkdir(exist_ok=True)
    file = folder / "program.py"
    file.write_text(HEAD + program)
    command = (sys.executable, str(file), *given)
    words = ("-m", "turbofit", "pretend", "--on", on, "--json", "--", *command)
    done = _run(words, cwd=folder, timeout=seconds, env=env)
    told = [line for line in done.stderr.splitlines() if line.startswith(_MARK)]
    result = json.loads(told[-1].removeprefix(_MARK)) if told else None
    return Ran(done.returncode, result, done.stderr, json.loads(done.stdout))


def cuda_json(*words: str, given: str | None = None, path: str = PATH) -> Any:
    """The JSON that a Python program prints, which may import the CUDA build of torch."""
    return json.loads(_run(words, env={"PYTHONPATH": path}, input=given, timeout=600.0).stdout)


def rehearsed_document(spec: Spec) -> dict[str, Any]:
    """The document of a rehearsal that an engine on the CUDA build of torch runs."""
    program = (
        "import json, sys; from turbofit.core.struct import decode; "
        "from turbofit.rehearsal.planned import rehearse; "
        "from turbofit.rehearsal.spec import Spec; "
        "print(json.dumps(rehearse(decode(sys.argv[1], Spec, what='spec'))))"
    )
    document: dict[str, Any] = cuda_json("-c", program, to_json(spec))
    return document


def _run(
    words: Sequence[str], *, env: Mapping[str, str], **keywords: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": PATH, **env},
        capture_output=True, text=True, check=False, **keywords,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done
