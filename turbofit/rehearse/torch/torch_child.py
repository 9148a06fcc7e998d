"""The child: LMDeploy's PyTorch engine or Transformers on a pretend machine, through the cases.

Run by ``turbofit.rehearse.torch.torch_run`` only. What it prints and what the engine logs goes to
a file; memory is in the timelines, which the account writes, and in the records of
``phase_recorder``.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from turbofit.pretend.documents import loaded
from turbofit.rehearse.torch.torch_drivers import DRIVERS
from turbofit.rehearse.torch.torch_notes import NotesReport
from turbofit.rehearse.torch.torch_spec import TorchSpec
from turbofit.rehearse.turbomind.notes import leave, peak_rss


def main(arguments: list[str]) -> NoReturn:
    """Runs a rehearsal in the folder that holds its ``spec.json``."""
    folder = Path(arguments[0])
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spec = loaded((folder / "spec.json").read_bytes(), TorchSpec)
    report = NotesReport(folder)
    # Where even this takes too long the parent ends all of us; the log then says where it stood.
    faulthandler.enable()
    faulthandler.dump_traceback_later(spec.case_seconds * (len(spec.cases) + 2) + 290, exit=True)
    try:
        close = _run(spec, report)
    except BaseException as error:  # noqa: BLE001 - told to the parent, which decides what it means
        traceback.print_exc()
        report.error(error)
        report.enter("end")
        leave(1)
    report.write(done=True, peak_rss=peak_rss())
    report.enter("end")
    if close is not None:
        close()
    leave(0)


def _run(spec: TorchSpec, report: NotesReport) -> Callable[[], None] | None:
    if not DRIVERS[spec.engine].batches:
        from turbofit.rehearse.torch.torch_generate import run_transformers

        run_transformers(spec, report)
        return None
    from turbofit.rehearse.torch.torch_engine import run_pytorch

    return run_pytorch(spec, report)


if __name__ == "__main__":
    main(sys.argv[1:])
