"""What was measured of one card: stages of a folder of results, documents of `report --share`."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from turbofit.core.machine import Gpu, Machine
from turbofit.core.plan import Plan
from turbofit.core.struct import decode, to_builtins
from turbofit.machine.presets import load_preset as gpu_preset
from turbofit.machine.presets import match_preset, preset_names
from turbofit.report.share import SharedRun

HERE = Path(__file__).parent
#: Folders of stages, as measured before `turbofit report --share` was there.
RESULTS = HERE / "results"
#: Documents of `turbofit report --share`, a file each.
OBSERVATIONS = HERE / "observations"


@dataclass(frozen=True)
class Results:
    """Of one card."""

    folder: Path
    #: Of the packages that ran.
    packages: dict[str, str | None]
    machine: Machine
    #: By the stage's name; of those that failed there is none.
    documents: dict[str, dict[str, Any]]
    #: Those of trials, by the stage.
    plans: dict[str, Plan]
    day: str = ""

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
        raise ValueError(f"{folder} has no machine.json: give a folder of bench/gpu/results")
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
        raise ValueError(f"{folder}: these are no results of a card: {exc}") from None
    good = {name: one for name, one in documents.items() if one.get("code") == 0}
    plans = {name: kept(folder, name, "plan.json") for name in good}
    read = {name: Plan.from_json(raw) for name, raw in plans.items() if raw is not None}
    day = max((plan.created.partition("T")[0] for plan in read.values()), default="")
    return Results(folder, head.get("packages", {}), machine, good, read, day)


def _with_uuids(machine: dict[str, Any]) -> dict[str, Any]:
    """They were left out when it was written."""
    gpus = [{"uuid": f"GPU-{gpu['index']}", **gpu} for gpu in machine["gpus"]]
    return {**machine, "gpus": gpus}


def kept(folder: Path, stage: str, member: str) -> bytes | None:
    """A file that a trial left beside its document; None where it left none."""
    try:
        with tarfile.open(folder / "logs" / f"{stage}.tar.gz") as tar:
            found = tar.extractfile(member)
            return None if found is None else found.read()
    except (OSError, tarfile.TarError, KeyError):
        return None


def engine_log(folder: Path, stage: str) -> str | None:
    """The engine's log of a stage's trial."""
    raw = kept(folder, stage, "engine-0.log")
    return None if raw is None else raw.decode(errors="replace")


def read(file: Path) -> SharedRun:
    """A document of `turbofit report --share`.

    Raises:
        UsageError: it is none.
    """
    return decode(file.read_bytes(), SharedRun, what=str(file))


#: Phases of a start that nobody calibrated, by what it tells beside the forecast.
_PHASES = {
    "free when the cache was sized": "context and weights",
    "in use after the check": "after the check",
}


def _starts(one: SharedRun) -> Iterator[dict[str, Any]]:
    """What the last start of a run without a calibration told, as phases of its card."""
    engines = one.run.attempts[-1].engines if one.run.attempts else ()
    for engine in engines if len(one.plan.gpus) == 1 else ():
        for row in engine.beside:
            if row.what in _PHASES and row.actual is not None:
                free = row.what.startswith("free")
                over = row.actual - row.forecast if free else row.forecast - row.actual
                yield {
                    "phase": _PHASES[row.what], "gpu": one.plan.gpus[0].index,
                    "forecast": row.forecast, "measured": row.actual, "over": over,
                }  # fmt: skip


def observed(file: Path) -> Results:
    """The same as a card with one trial."""
    one = read(file)
    packages = {"lmdeploy": one.run.lmdeploy, **one.packages}
    lived = one.run.state != "failed"
    document = {
        "outcome": "survived" if lived else "died", "phases": one.phases or list(_starts(one)),
        "seen": to_builtins(one.seen),
    }  # fmt: skip
    return Results(
        file.parent, packages, one.plan.machine, {file.stem: document}, {file.stem: one.plan},
        one.run.started,
    )  # fmt: skip
