"""Does llm-compressor live on a card of what `turbofit quantize` counts, and die with a tenth less?

    python -m bench.quantize [MODEL…]

Each row is a model of its own widths with two layers: the program that turbofit writes runs on two
pretend GPUs, with a CUDA build of torch (TURBOFIT_CUDA_PATH) and with llm-compressor, from the
folder LLMCOMPRESSOR_PATH (pip install --target). Nothing is computed, and memory is torch's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from turbofit.core.model import Model
from turbofit.machine.source import machine_from
from turbofit.model.presets import preset_model
from turbofit.model.quantize.fit import quantizing
from turbofit.model.quantize.program import Request
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
CARD = "1xa100-80g"
PACKAGES = os.environ.get("LLMCOMPRESSOR_PATH", "")
_SAMPLES = 4
_LINE = "a line of words that the tokenizer takes letter by letter, and so makes it long; " * 64
#: Nothing is computed, so the program counts no words, rounds no columns (that would be a million
#: launches), and asks not whether a matrix could be factored.
_EDITS = {
    "\nDEVICE = ": "\nfrom llmcompressor.modifiers.gptq import gptq_quantize\n"
    "gptq_quantize.gptq_block_update = lambda *_, **__: None\n"
    "def cholesky(A, upper, out):\n"
    "    info = torch.zeros((), dtype=torch.int32, device=A.device)\n"
    "    return torch.linalg.cholesky_ex(A, upper=upper, out=(out, info))[0]\n"
    "torch.linalg.cholesky = cholesky\nDEVICE = ",
    "return total / count": "return total",
}


def of_two_layers(name: str) -> Model:
    """A preset with two layers, and as many in its tower."""
    model = preset_model(name)
    text = replace(model.text, layers=2)
    if text.moe is not None:
        text = replace(text, moe=replace(text.moe, layers=2))
    vision = None if model.vision is None else replace(model.vision, layers=2)
    return replace(model, text=text, vision=vision)


def measured(name: str, tokens: int, folder: Path) -> dict[str, Any]:
    """Run the program of a model on a card of what was counted, and of a tenth less."""
    checkpoint = write_model(twin_of(of_two_layers(name)), folder / "model")
    samples = folder / "samples.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": _LINE}]})
    samples.write_text(f"{line}\n" * 2 * _SAMPLES)
    request = Request(name=str(checkpoint), data=str(samples), samples=_SAMPLES, tokens=tokens)
    counted = quantizing(resolve_model(str(checkpoint)), machine_from(CARD), request)
    program = counted.program
    for old, new in _EDITS.items():
        assert old in program, old
        program = program.replace(old, new)
    (folder / "program.py").write_text(program)
    count = counted.needs.card + counted.context
    return {
        "model": name,
        "tokens": tokens,
        "counted": count,
        "lives": ended(folder, count),
        "lives_with_a_tenth_less": ended(folder, int(count / 1.1)),
        "terms": counted.needs.card_terms,
    }


def ended(folder: Path, total: int) -> str:
    """Run the program on a card of ``total`` bytes; return ``yes``, or its last line."""
    path = os.pathsep.join((os.environ["TURBOFIT_CUDA_PATH"], PACKAGES, str(ROOT)))
    python, card = sys.executable, f"{CARD}:total={total}"
    shutil.rmtree(folder / "model-w4a16", ignore_errors=True)
    done = subprocess.run(
        [python, "-m", "turbofit", "pretend", "--on", card, "-q", "--", python, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines() + done.stdout.splitlines()
    errors = [line for line in lines if "Error" in line or "out of memory" in line]
    return "yes" if done.returncode == 0 else (errors or lines)[-1][:200]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__)
    parser.add_argument("models", nargs="*", default=["qwen2.5-vl-7b", "llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(name, given.tokens, Path(folder))
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
