"""Reads the condition of one GPU from NVML: links, errors, clocks and temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from turbofit.core.struct import NA, NaType, Struct
from turbofit.machine.nvml import GpuLostError, Nvml, answered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.core.machine import Gpu
    from turbofit.core.plan import GpuLedger

#: The value if the GPU does not have this feature.
ABSENT: Final = "absent"
Absent = Literal["absent"]
_UNCORRECTED, _VOLATILE = 1, 0
#: The first power state in which the GPU saves power.
_IDLE_STATE: Final = 5


class Health(Struct):
    """The present condition of one GPU. ``idle``: in its power state, links are slow on purpose.

    ``slow`` are the bits of NVML's clock event reasons; ``rows_*`` say whether memory rows wait to
    be remapped, or could not be.
    """

    index: int
    pcie_generation: int | NaType = NA
    pcie_width: int | NaType = NA
    idle: bool | NaType = NA
    ecc: bool | NaType | Absent = NA
    uncorrected: int | NaType | Absent = NA
    rows_pending: bool | NaType | Absent = NA
    rows_failed: bool | NaType | Absent = NA
    slow: int | NaType = NA
    temperature: int | NaType = NA


def read_health(gpus: Sequence[Gpu | GpuLedger]) -> tuple[Health, ...]:
    """Read the condition of whole GPUs, in the given order.

    Raises:
        MachineError: NVML cannot be opened.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        return tuple(_health(nvml, gpu) for gpu in gpus)


def _health(nvml: Nvml, gpu: Gpu | GpuLedger) -> Health:
    def read(name: str, *args: int, convert: Callable[[Any], Any] = int, absent: str = NA) -> Any:
        value, lacks = nvml.supported(f"nvmlDeviceGet{name}", handle, *args)
        if answered(value):
            return convert(value)
        return absent if lacks else NA

    def of_rows(place: int) -> Any:
        return read("RemappedRows", convert=lambda rows: bool(rows[place]), absent=ABSENT)

    try:
        handle = nvml.query("nvmlDeviceGetHandleByUUID", gpu.uuid)
        if not answered(handle):
            return Health(index=gpu.index)
        slow = read("CurrentClocksEventReasons")
        if slow == NA:  # a driver before 535
            slow = read("CurrentClocksThrottleReasons")
        return Health(
            index=gpu.index,
            pcie_generation=read("CurrPcieLinkGeneration"),
            pcie_width=read("CurrPcieLinkWidth"),
            idle=read("PerformanceState", convert=lambda state: int(state) >= _IDLE_STATE),
            ecc=read("EccMode", convert=lambda modes: bool(modes[0]), absent=ABSENT),
            uncorrected=read("TotalEccErrors", _UNCORRECTED, _VOLATILE, absent=ABSENT),
            rows_pending=of_rows(2),
            rows_failed=of_rows(3),
            slow=slow,
            temperature=read("Temperature", 0),
        )
    except GpuLostError:
        return Health(index=gpu.index)
