"""What NVML says of a GPU's condition, beside what planning needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from turbofit.core.struct import NA, NaType, Struct
from turbofit.machine.nvml import GpuLostError, Nvml, answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.machine import Gpu
    from turbofit.core.plan import GpuLedger

#: The GPU says that it has no such thing.
ABSENT: Final = "absent"
Absent = Literal["absent"]

_UNCORRECTED: Final = 1
_VOLATILE: Final = 0


class Health(Struct):
    """One GPU now. ``idle``: a power state at which links slow down on purpose.

    ``slow`` are the bits of NVML's clock event reasons; ``rows_*`` tell of memory rows that wait
    to be, or could not be, remapped.
    """

    index: int
    pcie_generation: int | NaType = NA
    pcie_width: int | NaType = NA
    idle: bool | NaType = NA
    persistence: bool | NaType = NA
    ecc: bool | NaType | Absent = NA
    uncorrected: int | NaType | Absent = NA
    rows_pending: bool | NaType | Absent = NA
    rows_failed: bool | NaType | Absent = NA
    slow: int | NaType = NA
    temperature: int | NaType = NA


#: From this power state on the GPU saves power.
_IDLE_STATE: Final = 5


def read_health(gpus: Sequence[Gpu | GpuLedger]) -> tuple[Health, ...]:
    """The condition of whole GPUs, in their order.

    Raises:
        MachineError: NVML cannot be opened.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        return tuple(_one(nvml, gpu) for gpu in gpus)


def _one(nvml: Nvml, gpu: Gpu | GpuLedger) -> Health:
    try:
        handle = nvml.query("nvmlDeviceGetHandleByUUID", gpu.uuid)
        if not answered(handle):
            return Health(index=gpu.index)
        state = nvml.query("nvmlDeviceGetPerformanceState", handle)
        persistence = nvml.query("nvmlDeviceGetPersistenceMode", handle)
        mode = _or_absent(nvml, "nvmlDeviceGetEccMode", handle)
        rows = _or_absent(nvml, "nvmlDeviceGetRemappedRows", handle)
        return Health(
            index=gpu.index,
            pcie_generation=_number(nvml.query("nvmlDeviceGetCurrPcieLinkGeneration", handle)),
            pcie_width=_number(nvml.query("nvmlDeviceGetCurrPcieLinkWidth", handle)),
            idle=NA if not answered(state) else int(state) >= _IDLE_STATE,
            persistence=NA if not answered(persistence) else bool(persistence),
            ecc=_flag(mode, 0),
            uncorrected=_number(
                _or_absent(nvml, "nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _VOLATILE)
            ),
            rows_pending=_flag(rows, 2),
            rows_failed=_flag(rows, 3),
            slow=_slow(nvml, handle),
            temperature=_number(nvml.query("nvmlDeviceGetTemperature", handle, 0)),
        )
    except GpuLostError:
        return Health(index=gpu.index)


def _or_absent(nvml: Nvml, function: str, *args: Any) -> Any:
    """An answer, `ABSENT` where the GPU has no such thing, else ``NA``."""
    value, absent = nvml.supported(function, *args)
    if answered(value):
        return value
    return ABSENT if absent else NA


def _slow(nvml: Nvml, handle: Any) -> int | NaType:
    """Clock event reasons; drivers before 535 have them under another name."""
    for function in (
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    ):
        value = nvml.query(function, handle)
        if answered(value):
            return int(value)
    return NA


def _flag(value: Any, place: int) -> Any:
    """One of several answers, as a truth; no answer stays what it is."""
    return value if isinstance(value, str) else bool(value[place])


def _number(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)
