"""What people write in one line, by the first byte: a machine, a size, a device map, a cluster."""

from __future__ import annotations

from typing import Any, Final

from bench.fuzz.check import expect
from turbofit.core.errors import UsageError
from turbofit.core.units import parse_bytes
from turbofit.machine.snapshot import check_possible
from turbofit.machine.spec import MAX_GPUS, parse_spec
from turbofit.planning.device_maps import read_map
from turbofit.planning.request import PlanRequest

WORDS: Final = (
    "4x", "rtx3090", "rtx4090", "l4", "a100", "h100", "3090x4", " x ", "×", "+", ":free=", ":used=",
    ":total=", "19GiB", "260MiB", ",nvlink=0-1+2-3", ",nvlink=none", ",p2p=none", ",p2p=all",
    ",ram=64GiB", "1e308", "inf", "nan", "-1", "٣", '{"model.layers.0-15": 0, "lm_head": "cpu"}',
    '"disk"', "640x480", "10%", "8192", "32k", "--",
)  # fmt: skip
_OPTIONS: Final = ("image_size", "margin", "budget", "context", "tp", "replicas", "gpus", "images")


def one(data: bytes) -> None:
    """A text is refused (UsageError), or what it means is possible."""
    if not data:
        return
    text = data[1:].decode("utf-8", "replace")
    kind = data[0] % 4
    try:
        if kind == 0:
            machine = parse_spec(text)
            assert 1 <= len(machine.gpus) <= MAX_GPUS
            check_possible(machine, "the machine")
        elif kind == 1:
            assert parse_bytes(text, what="a size") >= 0
        elif kind == 2:
            read_map("{" + text)
        else:
            name = _OPTIONS[data[0] // 4 % len(_OPTIONS)]
            values: dict[str, Any] = {"model": "m", "on": "rtx3090", name: text}
            PlanRequest.of_options(values, str)
    except UsageError as exc:
        expect(bool(exc.message and exc.hint) and "\n" not in exc.message, exc)


def seeds() -> list[bytes]:
    """Texts as the documents have them."""
    machines = (
        "4xrtx3090", "rtx3090+rtx4090", "1xl4:free=19GiB", "2xa10:total=23028MiB:used=260MiB",
        "4xrtx3090,nvlink=0-1+2-3", "2xrtx4090,p2p=none,ram=64GiB", "4 RTX 3090", "3090x4", "l4,l4",
        "h100*2", "gtx1080", "8xh100,nvlink=none",
    )  # fmt: skip
    sizes = ("19GiB", "260 MiB", "1.5g", "10", "1e3kB", "-1", "")
    maps = ('"model.layers.0-3": 0, "lm_head": "cpu"}', '"a": 1}', '"a": []}')
    options = (b"640x480", b"5%", b"1GiB", b"8192", b"2", b"1", b"0,1", b"3")
    found = [b"\0" + one.encode() for one in machines]
    found += [b"\1" + one.encode() for one in sizes] + [b"\2" + one.encode() for one in maps]
    return [*found, *(bytes((3 + 4 * place,)) + one for place, one in enumerate(options))]
