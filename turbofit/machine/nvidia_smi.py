"""Reads nvidia-smi's output on GPUs: its table, its list, and its answer to ``--query-gpu``.

``turbofit plan --on`` reads a whole text with `read_text`. The reader of logs uses `SmiTable` and
`listed`, line by line. For both, `groups` makes groups of a SPEC.

nvidia-smi counts sizes in MiB. Since driver 510, the used memory in nvidia-smi's table omits the
memory that the driver reserves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.core.units import MIB

#: A line of ``nvidia-smi -L`` or of collect_env, with one GPU; or a line of check_env, with all
#: equal GPUs.
_LISTED: Final = re.compile(
    r"\s*GPU\s+(\d+(?:,\d+)*):\s*(\w[\w.+/()-]*(?: +[\w.+/()-]+)*?)\s*(?:\(UUID:.*|$)"
)
#: The first line of ``--query-gpu``; a unit is in brackets, as in "memory.free [MiB]".
_QUERY: Final = re.compile(
    r"(?=.*(?:name|memory))[a-z_.]+( \[[\w%]+\])?(,\s*[a-z_.]+( \[[\w%]+\])?)*"
)
_MIB: Final = re.compile(r"\d+(?= MiB|$)").match
#: The line of a MIG slice, which follows the line of the slice's GPU.
_LISTED_SLICE: Final = re.compile(r"\s*MIG\s+(\S+)\s+Device\b")


class SmiGpu(Struct):
    """A GPU from nvidia-smi's table, from ``nvidia-smi -L``, or from another program's list.

    Sizes are in bytes, as nvidia-smi counts memory. ``count`` is the number of equal GPUs that one
    line of a list names. Neither ``used`` nor ``free`` has what the driver reserves, so
    ``used`` is not ``total`` less ``free``.
    """

    index: int
    name: str = ""
    count: int = 1
    used: int | None = None
    total: int | None = None
    free: int | None = None

    def spec(self) -> str:
        """Return the GPU, or all equal GPUs of its line, as one group of a SPEC."""
        parts = [f"{self.count}x{self.name}" if self.count > 1 else self.name]
        if self.total:
            parts[0] += f" {self.total // MIB} MiB"
        if self.free is not None:
            parts.append(f"free={self.free // MIB}MiB")
        elif self.used:
            parts.append(f"used={self.used // MIB}MiB")
        return ":".join(parts)


class MigSlice(Struct):
    """A MIG slice of the GPU listed before it: its profile, or its size in bytes."""

    profile: str = ""
    total: int | None = None


class SmiProcess(Struct):
    """A process in nvidia-smi's table."""

    gpu: int
    pid: int
    name: str
    used: int | None


class SmiTable:
    """Reads nvidia-smi's table line by line; a GPU takes two lines: its name, then its memory."""

    _NAME: Final = re.compile(r"\|\s+(\d+)\s+(\S+(?:\s+\S+)*?)\s{2,}(?:(?:On|Off|N/A)\s*)?\|")
    #: The same line with a name that fills its column, so only one space follows the name.
    _NAME_CUT: Final = re.compile(r"\|\s+(\d+)\s+(\S+(?:\s+\S+)*?)\s+(?:On|Off|N/A)\s*\|")
    _MEMORY: Final = re.compile(r"\|.*\|\s*(\d+)MiB\s*/\s*(\d+)MiB\s*\|")
    #: A row of the block "MIG devices": GPU, GPU instance, compute instance, device.
    _SLICE: Final = re.compile(r"\|\s+\d+\s+\d+\s+\d+\s+\d+\s+\|\s+\d+MiB\s*/\s*(\d+)MiB\s+\|")
    _PROCESS: Final = re.compile(
        r"\|\s+(\d+)\s+(?:\S+\s+\S+\s+)?(\d+)\s+(?:C|G|C\+G|M\+C)\s+(\S+(?:\s+\S+)*?)\s+"
        r"(?:(\d+)MiB|N/A)\s*\|"
    )

    def __init__(self) -> None:
        #: Index and name of the GPU whose line of memory has not come yet.
        self._named: tuple[int, str] | None = None

    def line(self, text: str) -> SmiGpu | SmiProcess | MigSlice | None:
        """Return the GPU, the process or the MIG slice that a line completes, or None.

        The first line of a GPU has the GPU's name, and the second line completes the GPU. If the
        second line is missing, the next GPU's first line completes the GPU, without its memory.
        """
        text = text.lstrip()
        if not text.startswith("|"):
            return None
        if match := self._PROCESS.match(text):
            used = int(match[4]) * MIB if match[4] else None
            return SmiProcess(gpu=int(match[1]), pid=int(match[2]), name=match[3], used=used)
        if match := self._SLICE.match(text):
            return MigSlice(total=int(match[1]) * MIB)
        if (match := self._MEMORY.match(text)) and self._named:
            (index, name), self._named = self._named, None
            used, total = (int(match[i]) * MIB for i in (1, 2))
            return SmiGpu(index=index, name=name, used=used, total=total)
        if match := self._NAME_CUT.match(text) or self._NAME.match(text):
            before, self._named = self.unfinished(), (int(match[1]), match[2])
            return before
        return None

    def unfinished(self) -> SmiGpu | None:
        """Return the last GPU if its name came without the line of its memory; else None."""
        return SmiGpu(index=self._named[0], name=self._named[1]) if self._named else None


def listed(line: str) -> SmiGpu | MigSlice | None:
    """Return the GPU or the slice in a line of a list; None if the line has neither."""
    if gpu := _LISTED.match(line):
        indices = gpu[1].split(",")
        return SmiGpu(index=int(indices[0]), name=gpu[2], count=len(indices))
    part = _LISTED_SLICE.match(line)
    return MigSlice(profile=part[1]) if part else None


def groups(gpus: list[SmiGpu], slices: list[MigSlice]) -> list[str]:
    """Return the GPUs as groups of a SPEC.

    If there are ``slices``, return only the MIG slice that an engine can use: the last slice of a
    table, with its size, or the first slice of a list, with its profile.
    """
    if not (gpus and slices):
        return [gpu.spec() for gpu in gpus]
    if slices[-1].total:
        return [f"{gpus[0].name}:total={slices[-1].total // MIB}MiB"]
    return [f"{gpus[0].name} MIG {slices[0].profile}"]


def read_text(text: str) -> list[str]:
    """Read the GPUs in nvidia-smi's table or list, each as a group of a SPEC (as for ``--on``).

    Other text gives no groups.

    Raises:
        UsageError: a line of the list is of no GPU.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and _QUERY.fullmatch(lines[0]):
        return [gpu.spec() for gpu in _queried(lines)]
    table = SmiTable()
    found = [*map(table.line, lines), table.unfinished()]
    gpus = [event for event in found if isinstance(event, SmiGpu)]
    slices = [event for event in found if isinstance(event, MigSlice)]
    return groups(gpus, slices) or _read_list(lines)


def _queried(lines: list[str]) -> Iterator[SmiGpu]:
    """Yield the GPUs of ``nvidia-smi --query-gpu=… --format=csv``, whose first line names columns.

    Raises:
        UsageError: there is no column of names.
    """
    columns = [column.partition(" ")[0] for column in map(str.strip, lines[0].split(","))]
    for line in lines[1:]:
        row = dict(zip(columns, map(str.strip, line.split(",")), strict=False))
        if "name" not in row:
            raise UsageError(
                "what nvidia-smi printed names no card",
                hint="ask for the names, too: nvidia-smi --query-gpu=name,memory.total,memory.used"
                " --format=csv",
            )
        sizes = {key: int(found[0]) * MIB for key, value in row.items() if (found := _MIB(value))}
        total, used, free = (sizes.get(f"memory.{key}") for key in ("total", "used", "free"))
        yield SmiGpu(index=0, name=row["name"], used=used, total=total, free=free)


def _read_list(lines: list[str]) -> list[str]:
    """Read the GPUs of ``nvidia-smi -L``; a card that MIG divides is replaced by its slices."""
    texts: list[str] = []
    found: list[SmiGpu | MigSlice | None] = [listed(line) for line in lines]
    whole = ""
    if None in found and any(found):
        raise UsageError(
            f"what nvidia-smi printed cannot be read: line {found.index(None) + 1} is of no GPU",
            hint="paste all that `nvidia-smi -L` prints, or its table",
        )
    for entry in found:
        if isinstance(entry, SmiGpu):
            whole = entry.spec()
            texts.append(whole)
        elif entry is not None:
            texts = texts[:-1] if texts[-1:] == [whole] else texts
            texts.append(f"{whole} MIG {entry.profile}".strip())
    return texts
