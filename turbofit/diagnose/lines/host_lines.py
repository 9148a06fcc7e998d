"""What the kernel, the shell and nvidia-smi print."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.units import KIB, MIB
from turbofit.diagnose.lines.events import HostKill, MigSlice, SmiDriver, SmiGpu, SmiProcess

if TYPE_CHECKING:
    from turbofit.core.struct import Struct

__all__ = ["SmiTable", "host_line"]

_KILLED: Final = re.compile(
    r"(Memory cgroup out of memory|[Oo]ut of memory)?:? ?Killed process (\d+) \(([^)]*)\)"
    r"(?:.*?anon-rss:(\d+)kB)?(?:.*?file-rss:(\d+)kB)?"
)
_SMI_HEAD: Final = re.compile(r"Driver Version: ([\d.]+)\s+CUDA Version: ([\d.]+|N/A)")
_SMI_NAME: Final = re.compile(r"^\|\s+(\d+)\s+(.+?)\s{2,}(?:On|Off|N/A)?\s*\|")
_SMI_NAME_CUT: Final = re.compile(r"^\|\s+(\d+)\s+(\S.*?)\s+(?:On|Off|N/A)\s*\|")
_SMI_MEMORY: Final = re.compile(r"^\|.*\|\s*(\d+)MiB\s*/\s*(\d+)MiB\s*\|")
#: A row of the table's block "MIG devices": GPU, GPU instance, compute instance, device.
_SMI_SLICE: Final = re.compile(r"^\|\s+\d+\s+\d+\s+\d+\s+\d+\s+\|\s+\d+MiB\s*/\s*(\d+)MiB\s+\|")
_SMI_PROCESS: Final = re.compile(
    r"^\|\s+(\d+)\s+(?:\S+\s+\S+\s+)?(\d+)\s+(?:C|G|C\+G|M\+C)\s+(\S.*?)\s+(?:(\d+)MiB|N/A)\s*\|"
)
#: ``nvidia-smi -L``, collect_env of torch (a line a GPU), check_env of LMDeploy (equal ones share).
_SMI_LIST: Final = re.compile(r"^\s*GPU (\d+(?:,\d+)*): (\w[\w .+/()-]*?)\s*(?:\(UUID:|$)")
_MIG: Final = re.compile(r"^\s*MIG (\S+)\s+Device\s+\d+:")
_SMI_CSV: Final = re.compile(r"^(\d+), ([^,]+), (\d+)(?: MiB)?, (\d+)(?: MiB)?\s*$")


def host_line(text: str) -> Struct | None:
    """The event of one line, or None."""
    if "Killed process" in text and (match := _KILLED.search(text)):
        rss = [int(match[i]) * KIB for i in (4, 5) if match[i]]
        return HostKill(
            pid=int(match[2]),
            name=match[3],
            rss=sum(rss) if rss else None,
            group="cgroup" in text,
        )
    if "Driver Version" in text and (match := _SMI_HEAD.search(text)):
        return SmiDriver(driver=match[1], cuda=match[2])
    if text.lstrip().startswith("GPU ") and (match := _SMI_LIST.match(text)):
        indices = match[1].split(",")
        return SmiGpu(index=int(indices[0]), name=match[2], count=len(indices))
    if "MIG " in text and (match := _MIG.match(text)):
        return MigSlice(profile=match[1])
    if match := _SMI_CSV.match(text):
        return SmiGpu(
            index=int(match[1]),
            name=match[2].strip(),
            used=int(match[3]) * MIB,
            total=int(match[4]) * MIB,
        )
    return None


class SmiTable:
    """Reads nvidia-smi's table, where a GPU takes two lines: its name, then its memory."""

    def __init__(self) -> None:
        self._index: int | None = None
        self._name = ""

    def line(self, text: str) -> Struct | None:
        """The event of one line, or None."""
        text = text.lstrip()
        if not text.startswith("|"):
            return None
        if match := _SMI_PROCESS.match(text):
            return SmiProcess(
                gpu=int(match[1]),
                pid=int(match[2]),
                name=match[3],
                used=int(match[4]) * MIB if match[4] else None,
            )
        if match := _SMI_SLICE.match(text):
            return MigSlice(total=int(match[1]) * MIB)
        if (match := _SMI_MEMORY.match(text)) and self._index is not None:
            gpu = SmiGpu(
                index=self._index,
                name=self._name,
                used=int(match[1]) * MIB,
                total=int(match[2]) * MIB,
            )
            self._index = None
            return gpu
        if match := (_SMI_NAME_CUT.match(text) or _SMI_NAME.match(text)):
            self._index, self._name = int(match[1]), match[2]
        return None
