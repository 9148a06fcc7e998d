"""Stage t: `turbofit tune` on a model's shape, beside LMDeploy's defaults under the same load.

The load is stage c's: so many requests at once, one image of 896 x 896 each, 64 tokens an answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench.gpu.load import Load
from bench.gpu.shapes import Shape, checkpoint

__all__ = ["T", "tuned"]

#: Both engines of LMDeploy; the smallest first.
T: Final = (
    Shape("qwen2-vl-2b"), Shape("qwen2-vl-2b", "pytorch"), Shape("qwen2-vl-7b"),
    Shape("qwen2-vl-7b", "pytorch"), Shape("internvl2-8b"),
)  # fmt: skip
#: Starts of an engine, and seconds that each is measured.
_STARTS: Final = 8
_MEASURED: Final = 15
_SIZE: Final = "896x896"
_LINES: Final = 12


def tuned(
    shape: Shape, scratch: Path, load: Load, seconds: float, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Tune one model under one engine; the document of ``turbofit tune --json``, and how it went.

    Args:
        shape: the model and the engine.
        scratch: where its folder is made.
        load: whose requests at once and tokens an answer are asked for.
        seconds: all trials together; a program that has not ended a minute later is killed.
        environ: of the program, and so where what it finds is kept.
    """
    folder = checkpoint(shape.model, scratch)
    command = [
        sys.executable, "-m", "turbofit", "tune", str(folder), "--engine", shape.engine,
        "--tp", "1", "--replicas", "1", "--time", f"{seconds:.0f}s", "--starts", str(_STARTS),
        "--seconds", str(_MEASURED), "--concurrency", str(load.concurrency),
        "--image-size", _SIZE, "--output-tokens", str(load.tokens), "--json",
    ]  # fmt: skip
    try:
        ended = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=seconds + 60,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"code": 1, "outcome": "out_of_time", "command": command[3:]}
    found = {"code": ended.returncode, "command": command[3:]}
    if ended.returncode:
        return {**found, "said": ended.stderr.splitlines()[-_LINES:]}
    return {**found, "tuning": json.loads(ended.stdout)}
