"""Keeps TurboMind's GEMM tuning from one start to the next.

The warm-up runs forwards of some twenty lengths and measures every kernel of every product. With
``TM_GEMM_EXPORT`` TurboMind writes its choices; with ``TM_GEMM_IMPORT`` TurboMind reads the choices
and runs no warm-up (tests/rehearsal/pretend/test_gemm_tuning.py). The executor's pool then grows at
the first requests, so a start that measures the peak never imports.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from turbofit.core.plan import Plan
from turbofit.core.process.files import digest_of_parts, state_dir
from turbofit.memory.engines import engine_of

_ROOM: Final = "gemm-tuning"
_IMPORT, _EXPORT = "TM_GEMM_IMPORT", "TM_GEMM_EXPORT"
#: Environment variables for the tuning, which an engine reads after its imports.
VARIABLES: Final = (_IMPORT, _EXPORT)
#: The file's head: a magic word, the format's number, bytes of a record, number of records. For the
#: engine, an incomplete file or a file of another format is empty; the engine then chooses
#: unmeasured kernels.
_HEAD: Final = struct.Struct("<8sIIQ")
_WORD: Final = b"TMGEMM2\0"


class GemmTuning:
    """The file with TurboMind's GEMM tuning for one group's model, cards and LMDeploy version.

    ``imports``: the next start may read the file; False for a start that must show the plan's peak.
    """

    def __init__(self, plan: Plan, group: int, lmdeploy: str, *, imports: bool) -> None:
        engine = plan.engines[group]
        settings = engine.settings
        gpus = [plan.machine.gpu(index) for index in engine.gpus]
        name = digest_of_parts(
            lmdeploy, plan.model.name, str(plan.model.weight_bytes), settings.dtype,
            str(settings.tp), str(settings.max_prefill_token_num),
            *(f"{gpu.name} {gpu.compute_capability}" for gpu in gpus),
        )  # fmt: skip
        self.imports = imports
        #: The file's name, and the name of the file that one start exports.
        self._name, self._part = name, f"{name}.{os.getpid()}-{group}"

    def environment(self) -> dict[str, str]:
        """Return the environment variable with which the next start imports or exports the tuning.

        Empty if the user has set one of the variables, or if the folder cannot be made.
        """
        if any(variable in os.environ for variable in VARIABLES):
            return {}
        try:
            folder = state_dir(_ROOM)
        except OSError:
            return {}
        if self.imports and records_of(folder / self._name):
            return {_IMPORT: str(folder / self._name)}
        return {_EXPORT: str(folder / self._part)}

    def keep(self) -> None:
        """Keep a start's export for the next starts, if the engine wrote it whole."""
        self.imports = True
        with suppress(OSError):
            folder = state_dir(_ROOM)
            if records_of(folder / self._part):
                (folder / self._part).replace(folder / self._name)


def records_of(file: Path) -> int:
    """Return the number of records in a complete file; 0 for a missing or incomplete file."""
    try:
        with file.open("rb") as opened:
            head, size = opened.read(_HEAD.size), file.stat().st_size
    except OSError:
        return 0
    if len(head) < _HEAD.size:
        return 0
    word, _, record, records = _HEAD.unpack(head)
    return int(records) if word == _WORD and size == _HEAD.size + record * records else 0


def give_tuning(
    launches: Sequence[Any],
    plan: Plan,
    lmdeploy: str,
    say: Callable[[str], None],
    *,
    imports: bool,
) -> None:
    """Give launches a `GemmTuning` if the engine measures kernels; print a line for an import."""
    if not engine_of(plan).tunes_kernels:
        return
    for launch in launches:
        launch.tuning = GemmTuning(plan, launch.group, lmdeploy, imports=imports)
    if any(launch.tuning and _IMPORT in launch.tuning.environment() for launch in launches):
        say("kernels: the choices of an earlier start, without a warm-up")
