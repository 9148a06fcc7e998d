"""The child: starts TurboMind on a pretend machine and drives the cases.

Run by ``turbofit.rehearse.turbomind.run`` only, with the pretend libraries on its own library
path. It reports on file descriptors and files that the parent gave it; memory is in
the timeline, which the account writes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from turbofit.core.errors import UsageError
from turbofit.pretend.library import LibraryAccount
from turbofit.rehearse.turbomind.inactivity import LIMITS_WHILE_ACTIVE, InactivityTimer
from turbofit.rehearse.turbomind.notes import Notes, leave, peak_rss
from turbofit.rehearse.turbomind.spec import Spec, load_spec

_PR_SET_PDEATHSIG: Final = 1
_STATUS = {
    0: "ok",
    1: "invalid",
    2: "conflict",
    5: "failed",
    6: "too_long",
    7: "finished",
    8: "cancelled",
    9: "inconsistent",
    10: "no_queue",
    11: "out_of_memory",
}


def _start(spec: Spec, account: LibraryAccount, report: Notes) -> Any:
    import torch  # noqa: F401 - its import is timed

    from turbofit.rehearse.turbomind.hooks import install

    report.at("torch")
    from lmdeploy.messages import TurbomindEngineConfig

    known = {field.name for field in dataclasses.fields(TurbomindEngineConfig)}
    unknown = sorted(set(spec.settings) - known)
    if unknown:  # LMDeploy would ignore them
        raise UsageError(
            f"LMDeploy's TurbomindEngineConfig has no field {', '.join(unknown)}",
            hint="give fields of the installed LMDeploy's engine configuration",
        )
    config = TurbomindEngineConfig(**spec.settings)

    def ready(engine: Any, staged: int | None) -> None:
        settings = {k: v for k, v in vars(engine.engine_config).items() if _plain(v)}
        report.write(resolved=settings, staging_peak=staged)

    install(
        spec.machine,
        account,
        first_device=(config.devices or [0])[0],
        staging=spec.staging,
        ready=ready,
    )
    report.at("import")
    from lmdeploy.turbomind.turbomind import TurboMind

    engine = TurboMind.from_pretrained(str(spec.model_dir), engine_config=config)
    report.at("ready")
    return engine


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str, bool, list))


def _quiet(account: LibraryAccount, seconds: float = 0.03, limit: float = 5.0) -> bool:
    """Waits until no thread calls CUDA any more; False where one does not stop."""
    timer = InactivityTimer(account.calls)
    while timer.inactive() < seconds:
        if timer.elapsed() > limit:
            return False
        time.sleep(0.005)
    return True


def _finished(pending: Sequence[Any], account: LibraryAccount, seconds: float) -> bool:
    """Waits for all requests; False where the engine has called nothing for so many seconds."""
    timer = InactivityTimer(account.calls)
    longest = LIMITS_WHILE_ACTIVE * seconds
    for one in pending:
        while not one.done.wait(0.2):
            if timer.inactive() > seconds or timer.elapsed() > longest:
                return False
    return True


def _run_case(engine: Any, case: Any, account: LibraryAccount, spec: Spec) -> dict[str, Any]:
    from turbofit.rehearse.turbomind.drive import submit

    # With data parallel attention the idle engine polls its queues, under their locks.
    whole = engine.engine_config.attn_dp_size == 1
    if not _quiet(account) or (whole and not account.freeze()):
        raise RuntimeError("the engine's threads could not be held")
    if not whole:
        account.mark(f"case {case.name}")
    try:
        pending = [submit(engine, i, request) for i, request in enumerate(case.requests)]
        if whole:
            account.mark(f"case {case.name}")
    finally:
        whole = account.thaw() and whole
    begun = time.monotonic()
    finished = _finished(pending, account, spec.case_seconds)
    _quiet(account)
    account.mark(f"after {case.name}")
    statuses = [_STATUS.get(one.status, str(one.status)) for one in pending]
    return {
        "name": case.name,
        "seconds": round(time.monotonic() - begun, 3),
        "statuses": {s: statuses.count(s) for s in sorted(set(statuses))},
        "tokens": [one.tokens for one in pending],
        "queued_whole": whole,
        "finished": finished,
    }


def end_with_parent(parent: int) -> None:
    """End when the parent ends, however it ends: an engine that hangs would use a core for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(arguments: list[str]) -> NoReturn:
    """Runs a rehearsal: specification, report file, folder of the pretend libraries, parent."""
    end_with_parent(int(arguments[3]))
    spec, report = load_spec(Path(arguments[0])), Notes(Path(arguments[1]))
    account = LibraryAccount(Path(arguments[2]))
    account.mark("import")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        engine = _start(spec, account, report)
        for case in spec.cases:
            report.write(running=case.name)
            done = _run_case(engine, case, account, spec)
            report.data["cases"].append(done)
            report.at(f"case {case.name}")
            if not done["finished"]:
                break
    except Exception as error:  # noqa: BLE001 - told to the parent, which decides what it means
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        report.write(
            error={
                "type": type(error).__name__,
                "message": str(error),
                "where": f"{Path(last.filename).name}:{last.lineno} {last.name}",
                "traceback": traceback.format_exc(),
            }
        )
        leave(1)
    report.write(done=True, peak_rss=peak_rss())
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
