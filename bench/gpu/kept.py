"""What a trial leaves beside its document: plan, engine's log, record; in ``logs/NAME.tar.gz``.

Rehearsals and the diagnosis are held against them afterwards, on machines without a GPU. UUIDs, the
machine's name and other processes are left out; each file and the folder are bounded.
"""

from __future__ import annotations

import io
import json
import platform
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbofit.core.plan import Plan

__all__ = ["engine_log", "keep", "plan_of"]

#: Bytes of one file's head and tail, and of the whole folder as it is compressed.
_HEAD, _TAIL, _FOLDER = 256 << 10, 768 << 10, 12 << 20


def keep(out: Path, name: str, plan: Path, files: Mapping[str, Path], scratch: Path) -> None:
    """Pack what is there of one trial; where the folder is full, its plan alone.

    Args:
        out: the run's folder of documents.
        name: of the stage, or of a step of it.
        plan: the plan's file.
        files: others, by the names that they get.
        scratch: a path that is of this machine only.
    """
    folder = out / "logs"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.tar.gz"
    if sum(one.stat().st_size for one in folder.iterdir() if one != file) > _FOLDER:
        files = {}
    raw = json.loads(plan.read_text()) if plan.exists() else {}
    hidden = _hidden(raw, scratch)
    for gpu in raw.get("machine", {}).get("gpus", []):
        gpu["holders"] = []
    packed = {"plan.json": json.dumps(raw).encode()} if raw else {}
    packed |= {to: _bounded(one) for to, one in files.items() if one.is_file()}
    part = file.with_name(f"{file.name}.part")
    with tarfile.open(part, "w:gz") as tar:
        for to, raw_data in packed.items():
            data = raw_data
            for word, shown in hidden.items():
                data = data.replace(word.encode(), shown.encode())
            member = tarfile.TarInfo(to)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    part.rename(file)


def _hidden(plan: Mapping[str, Any], scratch: Path) -> dict[str, str]:
    """What is replaced by what; the longest first."""
    gpus = plan.get("machine", {}).get("gpus", [])
    words = {str(gpu["uuid"]): f"GPU-{number}" for number, gpu in enumerate(gpus)}
    words |= {str(scratch): "SCRATCH", platform.node(): "HOST"}
    return {word: words[word] for word in sorted(words, key=len, reverse=True) if len(word) > 3}


def _bounded(file: Path) -> bytes:
    with file.open("rb") as read:
        size = file.stat().st_size
        if size <= _HEAD + _TAIL:
            return read.read()
        head = read.read(_HEAD)
        read.seek(size - _TAIL)
        left_out = f"\n[{size - _HEAD - _TAIL} bytes are left out here]\n"
        return head + left_out.encode() + read.read()


def _member(out: Path, name: str, member: str) -> bytes | None:
    file = out / "logs" / f"{name}.tar.gz"
    try:
        with tarfile.open(file) as tar:
            found = tar.extractfile(member)
            return None if found is None else found.read()
    except (OSError, tarfile.TarError, KeyError):
        return None


def plan_of(out: Path, name: str) -> Plan | None:
    """The plan that a stage's trial was started with; None where it was not kept."""
    raw = _member(out, name, "plan.json")
    return None if raw is None else Plan.from_json(raw)


def engine_log(out: Path, name: str) -> str | None:
    """The engine's log of a stage's trial."""
    raw = _member(out, name, "engine-0.log")
    return None if raw is None else raw.decode(errors="replace")
