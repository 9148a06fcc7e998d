"""Writes a checkpoint of a model's shapes without weights, for a machine without a network.

Weights are holes in files and read as zeros, and take as much memory as real ones. `turbofit
calibrate FOLDER` takes it. LMDeploy does not start InternVL2 so, whose Python files are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import checkpoint_for


def main(words: list[str] | None = None) -> int:
    """Write the checkpoint, and print its path."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.twin", description=__doc__)
    parser.add_argument("model", help="a preset's name")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(words)
    print(checkpoint_for(resolve_model(given.model), given.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
