"""Records the phases of each process of a rehearsal, and the counters of torch's allocator.

The child writes the name of a phase into a file. Each process with a CUDA context, also a worker of
Ray or ``mp``, has a thread. The thread reads the name, marks the phase in the account, and records
torch's counters of the last phase. The child waits up to five seconds for the threads of all
processes. The thread turns cuDNN's attention off, which torch prefers on Hopper: cuDNN
finds no plan on a pretend GPU. So a rehearsal does not see the memory that cuDNN takes. Sizes are
in bytes, devices are the machine's own numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from turbofit.core.struct import Document
from turbofit.rehearsal.notes import replaced
from turbofit.rehearsal.pretend.usage import lives

_LOOK: Final = 0.01  # seconds between two looks at the child's phase
_PATIENCE: Final = 5.0  # seconds that the child waits for the processes
_PHASE, _RECORDS = "phase", "records"


def start(folder: str) -> None:
    """Start the thread that records this process's phases into the rehearsal's folder."""
    threading.Thread(target=_keep, args=(Path(folder),), daemon=True, name="turbofit").start()


class Phases:
    """Begins a phase in the child, and waits until all processes have begun the phase."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        (folder / _RECORDS).mkdir(exist_ok=True)
        self._write("import")

    def enter(self, name: str) -> None:
        """Begin a phase, and wait until all processes have begun it."""
        self._number += 1
        self._write(" ".join(name.split()))
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            records = read_records(self._folder)
            behind = [record for record in records if record["number"] < self._number]
            if not any(lives(record["pid"]) for record in behind):
                return
            time.sleep(_LOOK / 4)

    def _write(self, name: str) -> None:
        replaced(self._folder / _PHASE, f"{self._number} {name}")


def read_records(folder: Path) -> list[Document]:
    """Read the records of all processes so far; sizes are in bytes.

    A record has ``pid``, ``number`` (of the current phase) and ``rows``, one for each ended phase
    and card. A row has ``phase``, ``gpu``, ``retries`` and sizes. ``requested`` (tensors only),
    ``allocated`` (whole blocks) and ``reserved`` are sizes at the end of the phase.
    ``allocated_peak`` and ``reserved_peak`` are the largest sizes in the phase.
    """
    records = []
    for path in sorted((folder / _RECORDS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def _keep(folder: Path) -> None:
    """Wait for the process's CUDA context; then write its record until the folder is removed."""
    while not _has_context():
        time.sleep(_LOOK)
        if not folder.exists():
            return
    sys.modules["torch"].backends.cuda.enable_cudnn_sdp(False)
    record = _ProcessRecord(folder)
    with contextlib.suppress(OSError):  # the folder is removed when the rehearsal ends
        while True:
            record.follow()
            time.sleep(_LOOK)


def _has_context() -> bool:
    torch = sys.modules.get("torch")
    is_initialized = getattr(getattr(torch, "cuda", None), "is_initialized", None)
    try:
        return bool(is_initialized and is_initialized())
    except Exception:  # noqa: BLE001 - another thread is importing torch
        return False


class _ProcessRecord:
    """The record of this process: torch's counters of each ended phase, in a file of the folder."""

    def __init__(self, folder: Path) -> None:
        from turbofit.rehearsal.pretend.libraries import LibraryAccount

        self._account = LibraryAccount(Path(os.environ["TURBOFIT_PRETEND_LIBRARIES"]))
        self._folder = folder
        self._path = folder / _RECORDS / f"{os.getpid()}.json"
        self._rows: list[dict[str, Any]] = []
        self._open: tuple[int, str] | None = None

    def follow(self) -> None:
        """Begin the child's phase in this process, if the child has begun a new phase."""
        number, _, name = (self._folder / _PHASE).read_text(encoding="utf-8").partition(" ")
        current = (int(number), name)
        if current == self._open:
            return
        if self._open is not None:
            self._close(self._open[1])
        self._account.mark(name)
        self._open = current
        text = json.dumps({"pid": os.getpid(), "number": current[0], "rows": self._rows})
        replaced(self._path, text)

    def _close(self, phase: str) -> None:
        """Add a row for each card with torch's counters of an ended phase; reset the peaks."""
        import torch

        for device in range(torch.cuda.device_count()):
            stats = torch.cuda.memory_stats(device)
            if not stats.get("reserved_bytes.all.peak"):
                continue
            row: dict[str, Any] = {"phase": phase, "gpu": self._account.physical(device)}
            for kind in ("allocated", "reserved"):
                row[kind] = stats.get(f"{kind}_bytes.all.current", 0)
                row[f"{kind}_peak"] = stats.get(f"{kind}_bytes.all.peak", 0)
            row["requested"] = stats.get("requested_bytes.all.current", 0)
            row["retries"] = stats.get("num_alloc_retries", 0)
            self._rows.append(row)
            torch.cuda.reset_peak_memory_stats(device)
