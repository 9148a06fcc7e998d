"""A folder for each package version, put first on a process's path before the bench's own rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, Final

#: What Transformers pins to itself; all else it needs is in the bench's own environment.
_BESIDE: Final = ("huggingface-hub", "tokenizers")
_SECONDS: Final = 900
_ROOT: Final = Path(__file__).resolve().parents[2]


def installed(cache: Path, package: str, version: str) -> Path:
    """The folder with one version of a package, installed when it is missing."""
    folder = cache / f"{package}-{version}"
    if folder.is_dir():
        return folder
    making = folder.with_suffix(".part")
    shutil.rmtree(making, ignore_errors=True)
    _install(making, f"{package}=={version}")
    beside = [text for text in _requirements(making, package) if text]
    if package == "transformers" and beside:
        _install(making, *beside)
    making.rename(folder)
    return folder


def probe(folders: list[Path], jobs: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """What the pair in these folders does with the checkpoints; see `probe.py`."""
    path = os.pathsep.join([*map(str, folders), str(_ROOT)])
    environment = {
        **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false", "HF_MODULES_CACHE": str(scratch / "modules"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.compatibility.probe"],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=_SECONDS,
        env=environment, check=False,
    )  # fmt: skip
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        failed = {"step": "process", "error": f"exit {done.returncode}: {last[:160]}", "where": ""}
        return {"failed": failed, "families": {}}


def demand(folder: Path) -> str:
    """The versions of Transformers that an LMDeploy's metadata allow."""
    lines = (line for line in _required(folder, "lmdeploy") if ";" not in line)
    return next(line.removeprefix("transformers") for line in lines if "transformers" in line)


def _install(folder: Path, *wanted: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile",
         "--target", str(folder), *wanted],
        check=True,
    )  # fmt: skip


def _requirements(folder: Path, package: str) -> list[str]:
    """What a package pins of those that change with it, as its metadata say."""
    plain = (line for line in _required(folder, package) if ";" not in line)
    return [line for line in plain if line.lower().replace("_", "-").startswith(_BESIDE)]


def _required(folder: Path, package: str) -> list[str]:
    metadata = next(folder.glob(f"{package}-*.dist-info")) / "METADATA"
    lines = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist")
    return [line.replace(" ", "") for line in lines or []]
