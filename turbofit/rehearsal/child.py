"""Drives an engine on pretend GPUs, in the child process that `run_child` starts."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from turbofit.core.process.interpreter import collect_after
from turbofit.core.struct import decode
from turbofit.rehearsal.engines import REHEARSED_ENGINES
from turbofit.rehearsal.notes import Notes
from turbofit.rehearsal.spec import Spec


def main(arguments: list[str]) -> NoReturn:
    """Run the rehearsal that ``spec.json`` in the folder ``arguments[0]`` describes, then exit."""
    collect_after(600_000)  # LMDeploy's import makes 520,000 objects, none of them garbage
    folder = Path(arguments[0])
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Python's own handler would not run while the engine's C++ code runs.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    spec = decode((folder / "spec.json").read_bytes(), Spec, what="spec.json")
    notes, close = Notes(folder), None
    code = 0
    try:
        close = import_module(REHEARSED_ENGINES[spec.engine].driver).drive(spec, notes)
        notes.write(done=True)
    except BaseException as error:  # noqa: BLE001 - the parent decides what the error means
        traceback.print_exc()
        notes.error(error)
        code = 1
    notes.enter("end")
    if close is not None:
        close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without a wait for the engine's threads


if __name__ == "__main__":
    main(sys.argv[1:])
