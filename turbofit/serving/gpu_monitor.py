"""Watches GPUs while engines run; warns of growing other processes and of lost cards.

The monitor never stops a server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Gpu, Machine
from turbofit.core.plan import GpuLedger, Plan
from turbofit.core.struct import NA
from turbofit.core.units import MIB, format_bytes
from turbofit.machine.nvml import ask_driver
from turbofit.planning.examine.cards import kept_margin, who_grew
from turbofit.serving.process.child import group_of

_EVERY: Final = 10.0
#: Growth below this many bytes is noise of drivers and displays.
_NOISE: Final = 64 * MIB
#: A warning's level if other processes have taken all headroom; level 1 if a part of it is left.
_DEADLY: Final = 2
_NO_ANSWER: Final[tuple[Machine | None, str]] = None, "NVML does not answer"


class GpuMonitor(threading.Thread):
    """A thread that looks at a plan's GPUs every ten seconds.

    ``engines`` returns the engines' process ids. ``warn`` receives a warning's kind and text. A
    warning is repeated only after its condition has ended, or at a higher level.
    """

    def __init__(
        self,
        plan: Plan,
        engines: Callable[[], Iterable[int]],
        warn: Callable[[str, str], None],
        *,
        every: float = _EVERY,
    ) -> None:
        super().__init__(name="gpu-monitor", daemon=True)
        self._plan, self._engines, self._warn, self._every = plan, engines, warn, every
        self._stopped = threading.Event()
        #: The level of the warning that was given of each present condition.
        self._said: dict[str, int] = {}
        #: By UUID, the level of a GPU's growth at the last look at which it was known.
        self._levels: dict[str, int] = {}

    def without_headroom(self, uuids: Iterable[str]) -> bool:
        """Return whether other processes had taken all headroom of a GPU at the last look."""
        return any(self._levels.get(uuid) == _DEADLY for uuid in uuids)

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(self._every):
            self.look()

    def look(self) -> None:
        """Measure the GPUs once, and warn of each new trouble."""
        machine, why = _measured()
        if machine is None:
            self._say("machine", 1, f"the GPUs cannot be read: {why}")
            return
        self._said.pop("machine", None)
        for ledger in self._plan.ledgers:
            self._look(ledger, machine)

    def _look(self, ledger: GpuLedger, machine: Machine) -> None:
        """Warn if a plan's GPU is lost, or if other processes have taken memory of its margin."""
        gpu = next((gpu for gpu in machine.gpus if gpu.uuid == ledger.uuid), None)
        if gpu is None or gpu.used == NA:
            lost = f"GPU {ledger.index} ({ledger.name}) does not answer NVML"
            self._say(f"lost {ledger.uuid}", 1, lost)
            return
        self._said.pop(f"lost {ledger.uuid}", None)
        others = _used_by_others(gpu, self._engines())
        if others is None:
            return
        grown = others - ledger.used
        left = ledger.headroom - grown
        margin = kept_margin(ledger)
        level = 0
        if grown >= _NOISE and left < margin:
            level = 1 if left > 0 else _DEADLY
        self._levels[ledger.uuid] = level
        name = f"grown {ledger.uuid}"
        if not level:
            self._said.pop(name, None)
            return
        who = who_grew(self._plan.machine.gpu(ledger.index), gpu, grown, set(self._engines()))
        worst = "a worst-case request can now kill the engine"
        if left > 0:
            worst = f"{format_bytes(left)} of the margin are left for the worst request"
        self._say(name, level, f"another process takes memory of the margin: {who}; {worst}")

    def _say(self, name: str, level: int, text: str) -> None:
        """Warn of a condition, unless a warning of this level or a higher level was given."""
        if self._said.get(name, 0) < level:
            self._said[name] = level
            self._warn(name.partition(" ")[0], text)


def used_now(plan: Plan) -> dict[int, int]:
    """Return the bytes that all processes use on each of the plan's GPUs, by index.

    Unreadable GPUs are left out.
    """
    machine, _ = ask_driver(_measured, _NO_ANSWER)
    if machine is None:
        return {}
    used = {gpu.uuid: gpu.used for gpu in machine.gpus if isinstance(gpu.used, int)}
    return {ledger.index: used[ledger.uuid] for ledger in plan.ledgers if ledger.uuid in used}


def beyond_forecast(plan: Plan, engines: Iterable[int]) -> int | None:
    """Return the bytes that engines hold beyond the plan's peak, on the GPU with the most bytes.

    Negative if the engines hold less on all GPUs. None if NVML does not show the engines' bytes on
    each GPU.
    """
    machine, _ = ask_driver(_measured, _NO_ANSWER)
    ours, beyond = set(engines), []
    for ledger in plan.ledgers:
        gpus = () if machine is None else machine.gpus
        gpu = next((gpu for gpu in gpus if gpu.uuid == ledger.uuid), None)
        others = None if gpu is None else _used_by_others(gpu, ours)
        if gpu is None or others is None or gpu.used == NA:
            return None
        beyond.append(gpu.used - others - (ledger.peak - ledger.used))
    return max(beyond)


def memory_back(plan: Plan, before: dict[int, int], seconds: float = 10.0) -> list[str]:
    """Wait until no GPU has more memory in use than ``before``, or until ``seconds`` have passed.

    Return a message for each GPU that still has more memory in use.
    """
    deadline = time.monotonic() + seconds
    while True:
        now = used_now(plan)
        more = {index: now[index] - before[index] for index in now if index in before}
        late = {index: size for index, size in more.items() if size > _NOISE}
        if not late or time.monotonic() > deadline:
            return [
                f"GPU {index} still has {format_bytes(size)} more in use than before the launch"
                for index, size in late.items()
            ]
        time.sleep(0.2)


def any_lost(uuids: Iterable[str]) -> bool:
    """Return whether NVML reports a GPU as lost, or as needing a reset.

    False if the driver does not answer.
    """
    return ask_driver(partial(_any_lost, tuple(uuids)), False)


def _any_lost(uuids: tuple[str, ...]) -> bool:
    """Ask NVML about each GPU; runs in the driver's thread."""
    from turbofit.machine.nvml import GpuLostError, Nvml, answered

    try:
        with Nvml() as nvml:
            for uuid in uuids:
                handle: Any = nvml.query("nvmlDeviceGetHandleByUUID", uuid)
                if answered(handle):
                    nvml.memory(handle)
    except GpuLostError:
        return True
    except Exception:  # noqa: BLE001 - as in `_measured`
        pass
    return False


def any_busy(uuids: Iterable[str], seconds: float = 2.0) -> bool | None:
    """Return whether one of these GPUs has computed within the last second.

    None if unknown: a GPU reports nothing and no other GPU reports work, or the driver does not
    answer within ``seconds``.
    """
    return ask_driver(partial(_any_busy, tuple(uuids)), None, seconds=seconds)


def _any_busy(uuids: tuple[str, ...]) -> bool | None:
    """Ask NVML for the GPUs' utilisation; runs in the driver's thread."""
    from turbofit.machine.nvml import Nvml, answered

    try:
        with Nvml() as nvml:
            handles = [nvml.query("nvmlDeviceGetHandleByUUID", uuid) for uuid in uuids]
            shares = [nvml.query("nvmlDeviceGetUtilizationRates", gpu) for gpu in handles]
    except Exception:  # noqa: BLE001 - as in `_measured`
        return None
    if any(answered(share) and share.gpu for share in shares):
        return True
    return False if all(map(answered, shares)) else None


def _used_by_others(gpu: Gpu, engines: Iterable[int]) -> int | None:
    """Return the bytes on a GPU that processes other than our engines hold.

    Memory without a process in NVML is included. None if NVML shows none of our engines, for
    example after the engines' end.
    """
    pids = set(engines)
    ours = [
        holder
        for holder in gpu.holders
        if isinstance(holder.pid, int) and (holder.pid in pids or group_of(holder.pid) in pids)
    ]
    if not ours or any(holder.bytes == NA for holder in ours) or gpu.used == NA:
        return None
    return gpu.used - sum(int(holder.bytes) for holder in ours)


def _measured() -> tuple[Machine | None, str]:
    """Return the machine, or None and the reason; no error of the driver may end a server."""
    from turbofit.machine.nvml_machine import measure

    try:
        return measure({}), ""  # all GPUs, without regard to CUDA_VISIBLE_DEVICES
    except TurbofitError as exc:
        return None, exc.message
    except Exception as exc:  # noqa: BLE001 - the engines serve in spite of any error
        return None, f"{type(exc).__name__}: {exc}"
