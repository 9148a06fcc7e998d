"""vLLM on a pair, where a Python that has it is given; a run takes up to a minute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from asked import LONG, QUEUED, meeting_units
from grid import Pair
from host import Peak
from row import Fate, Row

from turbofit.core.model import Model, TileRule
from turbofit.model.presets import find_preset, preset_model
from turbofit.rehearse.twin import checkpoint_for

FLAVOURS: Final = {"default": "vLLM's defaults", "eager": "vLLM, enforce_eager"}
_SECONDS: Final = 120
_CHILD: Final = Path(__file__).resolve().parent / "vllm_child.py"
_TOKENS: Final = re.compile(r"GPU KV cache size: ([\d,]+) tokens")
_ERROR: Final = re.compile(
    r"(?:ValueError|Value error|OutOfMemoryError|RuntimeError|AssertionError)[:,] (.*)"
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


def cases_of(model: Model) -> list[dict[str, Any]]:
    """The same requests as pictures, and a prompt; sampling's extremes are left out."""
    rule, cases = model.image_rule, list[dict[str, Any]]()
    if isinstance(rule, TileRule):
        # 3 x 4 tiles of the model's 12, and the thumbnail
        size = [4 * rule.tile_size, 3 * rule.tile_size]
        picture = {"size": size, "prompt": "<image>\n"}
        cases.append({"name": "one image", "count": 1} | picture)
        cases.append({"name": f"{QUEUED} images queued", "count": QUEUED} | picture)
    elif rule is not None:
        side = int(rule.max_pixels**0.5)
        meet = meeting_units(rule, model.text.max_position_embeddings)
        window = rule.patch_size * rule.merge
        less = int((meet // rule.merge**2) ** 0.5) * window
        prompt = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>"}
        cases.append({"name": "one image", "count": 1, "size": [side, side]} | prompt)
        queued = {"name": f"{QUEUED} images queued", "count": QUEUED, "size": [less, less]}
        cases.append(queued | prompt)
    cases.append({"name": "long prompt", "count": 1, "tokens": LONG})
    return cases


def vllm_row(pair: Pair, flavour: str, folder: Path, python: str) -> Row:
    """Starts vLLM, sends it the cases, and reads its own log."""
    preset = find_preset(pair.model)
    assert preset is not None
    model = preset_model(preset)
    checkpoint = folder / model.name
    if not checkpoint.exists():
        checkpoint_for(model, checkpoint)
    with Peak() as peak:
        log = _run(pair, flavour, checkpoint, cases_of(model), python)
    said = _SAID.findall(log)
    tokens = _TOKENS.search(log)
    fate, of = _fate(log, said)
    ready = next((float(rest) for word, rest in said if word == "ready"), None)
    return Row(
        pair=pair.name,
        who=FLAVOURS[flavour],
        settings="vLLM's own",
        tokens=int(tokens.group(1).replace(",", "")) if tokens else None,
        fate=fate,
        of=of,
        host=peak.bytes,
        pinned=None,
        ready=ready,
    )


def _run(
    pair: Pair, flavour: str, checkpoint: Path, cases: list[dict[str, Any]], python: str
) -> str:
    """The log of one run."""
    command = [sys.executable, "-m", "turbofit", "pretend", "--on", pair.on, "--python", python]
    command += ["--json", "--", python, str(_CHILD), str(checkpoint), flavour, json.dumps(cases)]
    environment = os.environ | _ENVIRONMENT | {"VLLM_CACHE_ROOT": str(checkpoint.parent / "vllm")}
    path = checkpoint.parent / "vllm.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=log,
        )  # fmt: skip
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
    keep = os.environ.get("PEERS_LOGS")
    text = path.read_text(encoding="utf-8", errors="replace")
    if keep:
        (Path(keep) / f"{pair.name} {flavour}.log".replace(":", "_")).write_text(text)
    return text


def _fate(log: str, said: list[tuple[str, str]]) -> tuple[Fate, str]:
    words = [word for word, _ in said]
    if "survived" in words:
        return "survived", ""
    errors = [line for line in _ERROR.findall(log) if "Engine core init" not in line]
    of = errors[0][:200] if errors else "nothing more was said in time"
    if "ready" not in words:
        return ("refused" if errors else "stalled"), of
    case = next((rest for word, rest in reversed(said) if word == "case"), "none")
    return ("died" if errors else "stalled"), f"case {case}: {of}"


def vllm_version(python: str) -> str:
    """vLLM and its torch, as installed."""
    ask = "from importlib.metadata import version as v; print(v('vllm'), 'with torch', v('torch'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.strip()
