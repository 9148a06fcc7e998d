"""Starts a torch engine's rehearsal on a pretend machine, and gathers what it left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.model import TextDims
from turbofit.pretend.documents import dumped
from turbofit.pretend.environment import CHANGING, cuda_site, find_turbofit, put_first
from turbofit.pretend.run import FinishedRun, run_pretend
from turbofit.pretend.scenario import Scenario
from turbofit.pretend.shared import SharedRecord
from turbofit.rehearse.torch.phase_recorder import read_records
from turbofit.rehearse.torch.torch_drivers import DRIVERS
from turbofit.rehearse.torch.torch_ledger import HeldBytes, held_by
from turbofit.rehearse.torch.torch_spec import TorchSpec
from turbofit.rehearse.turbomind.notes import read_notes
from turbofit.rehearse.turbomind.run import new_folder

__all__ = [
    "KEPT", "SERVED", "STAND_IN", "EndedRehearsal", "drafting_environment", "need_kernels",
    "need_packages", "run_torch", "torch_environment",
]  # fmt: skip

#: Variables that change what an engine allocates, Ray's too: a rehearsal is of its settings only.
_DROPPED: Final = (*CHANGING, "RAY_")
#: But for the one that people serve with; the document says its value.
KEPT: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_INSIDE: Final = Path(__file__).parent / "torch_inside"
#: For each process of a server.
SERVED: Final = Path(__file__).parent / "served_inside"
#: Has a stand-in for FlashAttention-3, which drafting does not start without.
STAND_IN: Final = Path(__file__).parent / "stand_in"
_START_SECONDS: Final = 300.0
_LOG_BYTES: Final = 4 << 20
#: Signals that a person or a service sends, and which the child was given.
_STOPPED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class EndedRehearsal:
    """A rehearsal that has ended.

    Attributes:
        spec: what was rehearsed.
        ran: the run on the pretend machine.
        held: what each process held, by phase and card, as the account saw it.
        records: what torch's allocator said, by process.
        report: what the child told.
        log: its output and the engine's log.
        late: whether it was ended because it took too long.
    """

    spec: TorchSpec
    ran: FinishedRun
    held: tuple[HeldBytes, ...]
    records: list[dict[str, Any]]
    report: Mapping[str, Any]
    log: str
    late: bool


def need_packages(engine: str, *, ray: bool = False) -> dict[str, str]:
    """The versions of what a rehearsal needs.

    Args:
        engine: ``pytorch`` or ``transformers``.
        ray: whether its workers are Ray's.

    Raises:
        UsageError: no engine has this name.
        PackageError: something is missing, or torch is no CUDA build.
    """
    driver = DRIVERS.get(engine)
    if driver is None:
        raise UsageError(
            f"{engine} is no engine that is rehearsed on torch", hint=f"{' or '.join(DRIVERS)}"
        )
    names = (*driver.packages, *(["ray"] if ray else []))
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PackageError(
                f"{name} is not installed beside turbofit: rehearsing {engine} runs it",
                hint=f"pip install {'lmdeploy==0.18.0' if name == 'lmdeploy' else name}",
            )
    if cuda_site() is None:
        raise PackageError(
            f"this Python's torch is no CUDA build, which rehearsing {engine} runs",
            hint="install torch from PyPI (pip install torch==2.12.1); no GPU and no driver needed",
        )
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def need_kernels(text: TextDims) -> None:
    """Kernels of gated delta nets, which LMDeploy requires and imports of such a model alone.

    Raises:
        PackageError: they are not there.
    """
    if text.delta is not None and importlib.util.find_spec("fla") is None:
        raise PackageError(
            f"fla is not installed beside turbofit: rehearsing {text.architecture} runs its"
            " kernels",
            hint="pip install flash-linear-attention",
        )


def run_torch(spec: TorchSpec, scenario: Scenario, keep: Path | None = None) -> EndedRehearsal:
    """Runs a rehearsal's child and all that it starts, to the end.

    Args:
        spec: what to rehearse.
        scenario: the machine; each process pays for its own CUDA context.
        keep: where to leave timelines and log; by default they are removed.

    Raises:
        PackageError: see ``need_packages``.
        PretendError: the pretend libraries cannot be built.
    """
    folder = new_folder()
    try:
        (folder / "spec.json").write_text(dumped(spec), encoding="utf-8")
        limit = _START_SECONDS + (spec.case_seconds + 10) * (len(spec.cases) + 1)
        deadline = _Deadline(limit)
        ran = run_pretend(
            [sys.executable, "-m", "turbofit.rehearse.torch.torch_child", str(folder)],
            scenario,
            keep=folder / "pretend",
            stdout=2,
            on_poll=deadline,
            base=drafting_environment(folder, spec),
        )
        report = read_notes(folder)
        interrupted = (report.get("error") or {}).get("type") == "KeyboardInterrupt"
        if interrupted or -ran.code in _STOPPED:
            raise KeyboardInterrupt
        seen = EndedRehearsal(
            spec=spec,
            ran=ran,
            held=held_by(ran.usages),
            records=read_records(folder),
            report=report,
            log=_tail(folder / "log"),
            late=deadline.late,
        )
        if keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
        return seen
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drafting_environment(folder: Path, spec: TorchSpec) -> dict[str, str]:
    """The environment of a rehearsal, with the stand-in that drafting needs where it drafts."""
    env = torch_environment(folder, spec.environ)
    if spec.speculative:
        put_first(env, "PYTHONPATH", str(STAND_IN))
    return env


class _Deadline:
    """Ends the machine's processes where they take too long."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self.late = False

    def __call__(self, _: Scenario, shared: SharedRecord) -> None:
        if time.monotonic() < self._until:
            return
        self.late = True
        for process in shared.processes:
            if process.alive:
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)


def torch_environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rehearsal's child, whose notes and records are in a folder.

    Args:
        folder: the child's; it finds it as ``TURBOFIT_REHEARSAL``.
        variables: the engine's own variables.
    """
    env = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(_DROPPED)}
    env |= variables
    put_first(env, "PYTHONPATH", str(_INSIDE))
    find_turbofit(env)
    env |= {
        "TURBOFIT_REHEARSAL": str(folder),
        "LMDEPLOY_ENABLE_CHECK_ENV": "0",  # it computes on the card, and compares values
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    return env


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
