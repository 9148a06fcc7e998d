"""vLLM on a pair, where a Python that has it is given; a run takes up to a minute or two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.peers.grid import Pair
from bench.peers.host import Peak
from bench.peers.row import Fate, Row
from bench.peers.vllm_cases import cases_of
from bench.peers.workload import LONG
from turbofit.core.model import Model
from turbofit.model.presets import find_preset, preset_model
from turbofit.rehearse.checkpoint.twin import checkpoint_for


class Flavour(NamedTuple):
    """Options of vLLM beside the defaults of ``vllm serve``; ``by_hand``: no peer of the bar."""

    name: str
    options: dict[str, Any]
    by_hand: bool = False


#: What a plan promises too: one image a request, no video, as much context as there is room for.
_BY_HAND: Final = {
    "enforce_eager": True,
    "max_model_len": -1,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
}
FLAVOURS: Final = (
    Flavour("vLLM's defaults", {}),
    Flavour("vLLM, enforce_eager", {"enforce_eager": True}),
    Flavour("vLLM by hand", _BY_HAND, by_hand=True),
    Flavour("vLLM by hand, 0.97", _BY_HAND | {"gpu_memory_utilization": 0.97}, by_hand=True),
)
_SECONDS: Final = 600
_QUIET: Final = 200  # seconds without a word after which nothing more is awaited
_CHILD: Final = Path(__file__).resolve().parent / "vllm_child.py"
_TOKENS: Final = re.compile(r"GPU KV cache size: ([\d,]+) tokens")
_ERROR: Final = re.compile(
    r"(?:ValueError|Value error|OutOfMemoryError|RuntimeError|AssertionError|NotImplementedError"
    r"|KeyError|TypeError|AttributeError|OSError|ImportError|ValidationError)[:,] (.*)"
)
#: Of memory, or of what vLLM says that it does not run; all else is the pretend machine's doing.
_MEANT: Final = re.compile(
    r"out of memory|KV cache|Free memory on device|gpu_memory_utilization|compute capability"
    r"|not supported|No available memory|larger than the available",
    re.IGNORECASE,
)
_SAID: Final = re.compile(r"^PEERS (\w+) ?(.*)$", re.MULTILINE)
#: What a vLLM of its own would look for outside, or would not do on one pretend card.
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "OMP_NUM_THREADS": "1",
}


def stand_in(pair: Pair, folder: Path) -> tuple[Model, Path]:
    """The model of a pair, and a checkpoint of its dimensions in ``folder``.

    Raises:
        UsageError: no stand-in can be made of it.
    """
    preset = find_preset(pair.model)
    assert preset is not None
    model = preset_model(preset)
    checkpoint = folder / model.name
    if not (checkpoint / "config.json").exists():
        checkpoint_for(model, checkpoint)
    return model, checkpoint


def vllm_row(pair: Pair, flavour: Flavour, folder: Path, python: str) -> Row:
    """Starts vLLM, sends it the cases, and reads its own log."""
    model, checkpoint = stand_in(pair, folder)
    with Peak() as peak:
        log = _run(pair, flavour, checkpoint, cases_of(model), python)
    said = _SAID.findall(log)
    tokens = _TOKENS.search(log)
    fate, of = _fate(log, said)
    ready = next((float(rest) for word, rest in said if word == "ready"), None)
    return Row(
        pair=pair.name,
        who=flavour.name,
        settings="vLLM's own",
        tokens=int(tokens.group(1).replace(",", "")) if tokens else None,
        fate=fate,
        of=of,
        host=peak.bytes,
        pinned=None,
        ready=ready,
        note=_note(said),
    )


def _run(
    pair: Pair, flavour: Flavour, checkpoint: Path, cases: list[dict[str, Any]], python: str
) -> str:
    """The log of one run, with a compile cache of its own: a first start."""
    command = [sys.executable, "-m", "turbofit", "pretend", "--on", pair.on, "--python", python]
    command += ["--json", "--", python, str(_CHILD), str(checkpoint)]
    command += [json.dumps(flavour.options), json.dumps(cases)]
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        path = Path(scratch) / "log"
        environment = os.environ | _ENVIRONMENT | {"VLLM_CACHE_ROOT": f"{scratch}/cache"}
        environment["PYTHONPATH"] = _without_torch(environment.get("PYTHONPATH", ""))
        with path.open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=log,
            )  # fmt: skip
            _await(process, path)
        text = path.read_text(encoding="utf-8", errors="replace")
    keep = os.environ.get("PEERS_LOGS")
    if keep:
        name = re.sub(r"[:/ ]", "_", f"{pair.name} {flavour.name}.log")
        (Path(keep) / name).write_text(text, encoding="utf-8")
    return text


def _without_torch(path: str) -> str:
    """Folders to import from, less those that hold a torch: LMDeploy's is not vLLM's."""
    folders = path.split(os.pathsep)
    return os.pathsep.join(one for one in folders if one and not (Path(one) / "torch").exists())


def _await(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it ends, or has said nothing for long: compiling on shared cores is slow."""
    begun = heard = time.monotonic()
    size = 0
    while process.poll() is None:
        time.sleep(0.5)
        now, grown = time.monotonic(), log.stat().st_size
        if grown != size:
            size, heard = grown, now
        if now - heard > _QUIET or now - begun > _SECONDS:
            process.terminate()
            process.wait()


def _fate(log: str, said: list[tuple[str, str]]) -> tuple[Fate, str]:
    """How it ended. What kernels that computed nothing may have done is no fate."""
    words = [word for word, _ in said]
    if "survived" in words:
        return "survived", ""
    errors = [line for line in _ERROR.findall(log) if "Engine core init" not in line]
    meant = [line for line in errors if _MEANT.search(line)]
    of = _short((meant or errors or ["nothing more was said in time"])[0])
    if "ready" not in words:
        return ("refused" if meant else "stalled"), of
    case = next((rest for word, rest in reversed(said) if word == "case"), "none")
    return ("died" if meant else "stalled"), f"case {case}: {of}"


def _short(told: str) -> str:
    """What was missing, without the advice after it."""
    for rest in (" GPU 0 has a total", " Based on the available", " Decrease GPU memory"):
        told = told.partition(rest)[0]
    return told[:200]


def _note(said: list[tuple[str, str]]) -> str:
    """What it turned away while it lived."""
    told = [f"turned away: {rest}" for word, rest in said if word == "away"]
    told += [
        f"session of {rest}" for word, rest in said if word == "session" and int(rest) - 2 < LONG
    ]
    return ", ".join(told)


def vllm_version(python: str) -> str:
    """vLLM and its torch, as installed."""
    ask = "from importlib.metadata import version as v; print(v('vllm'), 'with torch', v('torch'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.strip()
