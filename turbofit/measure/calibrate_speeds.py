"""Measures the speeds that forecasts use, as a part of `turbofit calibrate`.

A child process (`calibrate_program.py`) prepares one image on a core of the host. If torch is
installed, the process also measures each card of the plan, copies between each two cards, and
NCCL's all-reduces. The results are kept for these GPUs (`machine/learned.py`). Later plans forecast
by them, and plan a pair with wrong copies without peer access.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine, Measured
from turbofit.core.process.progress import under_way
from turbofit.core.struct import decode, to_json
from turbofit.machine.learned import keep, with_measured

PROGRAM: Final = Path(__file__).with_name("calibrate_program.py")
#: Seconds; the program begins no task later.
_SECONDS: Final = 60.0
#: Seconds in addition, for the program's imports, contexts and last task.
_GRACE: Final = 60.0
#: Seconds to wait for the program's end after SIGKILL.
_LAST: Final = 10.0


def measure_speeds(
    machine: Machine,
    gpus: Sequence[int],
    say: Callable[[str], None],
    *,
    command: Sequence[str] = (sys.executable, "-I", str(PROGRAM)),
) -> bool:
    """Measure these GPUs and the host; return whether a result was kept for later plans.

    The caller has reserved a context and 0.6 GiB on each GPU. ``say`` receives a line for each
    result that could not be measured or kept.
    """
    measured = _measured(machine, gpus, command)
    for text in measured.left_out:
        say(f"not measured: {text}")
    if not (measured.cards or measured.image_seconds):
        return False
    found = with_measured(machine, _beside(machine.measured, measured, {*gpus}))
    for text in found.warnings:
        if text not in machine.warnings:
            say(f"warning: {text}")
    assert found.measured is not None
    try:
        keep(machine, found.measured)
    except (OSError, UsageError) as exc:
        say(f"warning: measured speeds are not kept: {exc}")
        return False
    say("measured cards, copies between them, and an image on a core: turbofit machine shows them")
    return True


def _measured(machine: Machine, gpus: Sequence[int], command: Sequence[str]) -> Measured:
    """Run the program; return the results that it printed, also if the driver hangs or crashes."""
    env = {
        **os.environ,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(machine.gpu(index).uuid for index in gpus),
    }
    words = [*command, str(_SECONDS), *map(str, gpus)]
    fields = defaultdict[str, list[Any]](list)
    # A file and no pipe: a process that hangs in the driver survives SIGKILL with its pipe open.
    with under_way("measuring cards, links and an image"), TemporaryFile() as output:
        child = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_SECONDS + _GRACE)
        finally:
            child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LAST)
        output.seek(0)
        for line in output:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):  # a library's own line
                for field, value in msgspec.json.decode(line, type=dict[str, Any]).items():
                    fields[field].append(value)
    if child.returncode is None:
        fields["left_out"].append(f"process {child.pid} was killed and hangs in the driver")
    elif child.returncode:
        fields["left_out"].append(f"all after the program ended with exit code {child.returncode}")
    single = {"torch": "", "image_seconds": 0.0}
    values = {name: next(iter(fields[name]), empty) for name, empty in single.items()}
    return decode(to_json({**fields, **values}), Measured, what="the measurement")


def _beside(old: Measured | None, new: Measured, gpus: set[int]) -> Measured:
    """Return the new results, with an earlier measurement's results for other GPUs."""
    if old is None:
        return new
    cards = [card for card in old.cards if card.index not in gpus]
    pairs = [pair for pair in old.pairs if not {pair.source, pair.target} <= gpus]
    reduces = [reduction for reduction in old.reduces if not {*reduction.gpus} <= gpus]
    return replace(
        new,
        torch=new.torch or old.torch,
        cards=(*cards, *new.cards),
        pairs=(*pairs, *new.pairs),
        reduces=(*reduces, *new.reduces),
        image_seconds=new.image_seconds or old.image_seconds,
    )
