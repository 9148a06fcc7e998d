"""Kept results of one card: its machine, and the documents of stages that went well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from bench.gpu.kept import plan_of
from turbofit.core.machine import Gpu, Machine
from turbofit.core.plan import Plan
from turbofit.machine.presets import load_preset as gpu_preset
from turbofit.machine.presets import match_preset, preset_names

__all__ = ["Results", "load"]


@dataclass(frozen=True)
class Results:
    """A folder that ``bench.gpu --out`` wrote, here or anywhere."""

    folder: Path
    #: Of the packages that ran.
    packages: dict[str, str | None]
    machine: Machine
    #: By the stage's name; of those that failed there is none.
    documents: dict[str, dict[str, Any]]
    #: Whether the card was one; its figures say nothing of any.
    pretend: bool = False

    @property
    def gpu(self) -> Gpu:
        """The one that was measured, by ``--gpu``."""
        gpus, visible = self.machine.gpus, self.machine.visible
        return next((gpu for gpu in gpus if visible and gpu.index == visible[0]), gpus[0])

    @cached_property
    def preset(self) -> str | None:
        """The name of the card's preset; None where it has none."""
        found = match_preset(self.gpu)
        return next((key for key in preset_names() if gpu_preset(key) == found), None)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """Plans of trials that were kept, by stage."""
        found = {name: plan_of(self.folder, name) for name in self.documents}
        return {name: plan for name, plan in found.items() if plan is not None}

    def trials(self) -> Iterator[tuple[str, dict[str, Any], Plan]]:
        """Stages that read NVML in each phase, with their plans, where those were kept."""
        for name, plan in self.plans.items():
            if self.documents[name].get("phases"):
                yield name, self.documents[name], plan


def load(folder: Path) -> list[Results]:
    """A folder's results, or those of all cards in folders below it.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("machine.json")) or sorted(folder.glob("*/machine.json"))
    found = [_read(file.parent) for file in files]
    if not found:
        raise ValueError(f"{folder} has no machine.json: give a folder that --out has written")
    return found


def _read(folder: Path) -> Results:
    try:
        head = json.loads((folder / "machine.json").read_text())
        machine = msgspec.convert(_with_uuids(head["machine"]), Machine)
        documents = {
            file.stem: json.loads(file.read_text())
            for file in sorted(folder.glob("[a-z]-*.json"))
        }  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise ValueError(f"{folder}: these are no results of bench.gpu: {exc}") from None
    good = {name: one for name, one in documents.items() if one.get("code") == 0}
    pretend = bool(head.get("pretend"))
    return Results(folder, head.get("packages", {}), machine, good, pretend)


def _with_uuids(machine: dict[str, Any]) -> dict[str, Any]:
    """They were left out when it was written."""
    gpus = [{"uuid": f"GPU-{gpu['index']}", **gpu} for gpu in machine["gpus"]]
    return {**machine, "gpus": gpus}
