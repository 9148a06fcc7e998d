"""Does llm-compressor take of a card and of the host what `turbofit quantize` counts?

    python -m bench.quantize [MODEL…] --packages FOLDER

Each row is a model of its own widths with two layers: the program that turbofit writes runs on a
pretend GPU, with a CUDA build of torch (TURBOFIT_CUDA_PATH) and with llm-compressor, which FOLDER
holds (pip install --target FOLDER --no-deps …). Nothing is computed, and memory is torch's own.
"""

from __future__ import annotations

import argparse
import json
import os
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
_PRETEND = ("pretend", "--on", CARD, "--json")
_SAMPLES = 4
_LINE = "a line of words that the tokenizer takes letter by letter, and so makes it long; " * 64
#: Nothing is computed, so the program counts no words, and rounds no columns: that would be a
#: million launches. The host's peak is printed at its end.
_EDITS = {
    "\nDEVICE = ": "\nfrom llmcompressor.modifiers.gptq import gptq_quantize\n"
    "gptq_quantize.gptq_block_update = lambda *_, **__: None\nDEVICE = ",
    "return total / count": "return total",
    "    main()\n": "    main()\n    import resource\n"
    "    print('HOST', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n",
}


def of_two_layers(name: str) -> Model:
    """A preset with two layers, and as many in its tower."""
    model = preset_model(name)
    text = replace(model.text, layers=2)
    if text.moe is not None:
        text = replace(text, moe=replace(text.moe, layers=2))
    vision = None if model.vision is None else replace(model.vision, layers=2)
    return replace(model, text=text, vision=vision)


def measured(name: str, packages: str, tokens: int, folder: Path) -> dict[str, Any]:
    """Run the program of a model; return what was counted and what it took, in bytes."""
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
    path = os.pathsep.join((os.environ["TURBOFIT_CUDA_PATH"], packages, str(ROOT)))
    python = sys.executable
    done = subprocess.run(
        [python, "-m", "turbofit", *_PRETEND, "--", python, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    host = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("HOST")]
    if not host:
        raise SystemExit(done.stderr[-6000:])
    peak = json.loads(done.stdout)["gpus"][0]["peak"]
    return {
        "model": name,
        "tokens": tokens,
        "card": {"counted": counted.needs.card + counted.context, "taken": peak},
        "host": {"counted": counted.needs.host, "taken": int(host[0])},
        "terms": counted.needs.card_terms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__)
    parser.add_argument("models", nargs="*", default=["qwen2.5-vl-7b", "llama-3.1-8b"])
    parser.add_argument("--packages", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(name, given.packages, given.tokens, Path(folder))
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        over = row["card"]["counted"] / row["card"]["taken"] - 1
        print(f"{name}: {over:+.1%} on the card, {row}", flush=True)


if __name__ == "__main__":
    main()
