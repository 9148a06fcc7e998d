"""``turbofit machine --measure``: measures cards, links and the host, and stores the results.

A pair of GPUs that copies wrong data is planned without peer access from then on: behind some
IOMMUs the driver reports peer access that the hardware does not have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.machine import CardSpeed, Link, Machine, Measured, PairSpeed, ReduceSpeed
from turbofit.core.process.child import output_of
from turbofit.core.process.files import digest_of_parts, state_dir, write_atomic
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.progress import under_way
from turbofit.core.struct import decode, to_json

_LOG: Final = LazyLogger(__name__)

_PROGRAM: Final = str(Path(__file__).with_name("speed_program.py"))
_IMAGE_PROGRAM: Final = str(Path(__file__).with_name("image_program.py"))
_SECONDS: Final = 60.0
#: The time limit for a second of processor time and the imports, on a busy host.
_IMAGE_SECONDS: Final = 60.0
#: The extra time for the program: its last task, and the creation of contexts.
_GRACE: Final = 60.0
#: The time limit for the end of a process after SIGKILL.
_LAST_SECONDS: Final = 10.0
_NO_CUDA: Final = 3


def measured_machine(
    machine: Machine, say: Callable[[str], None], warn: Callable[[str], None]
) -> Machine:
    """Measure host, cards and links; returns the machine with the results, which are stored.

    Raises:
        PackageError: neither cards nor host can be measured: a package is missing.
        MachineError: as :func:`measure_speed`.
    """
    seconds = measure_images()
    if seconds:
        say(f"a core of the host: {seconds * 1e3:.0f} ms for an image of 1920x1080 as nine tiles")
    try:
        speed = measure_speed(machine, say=say)
    except PackageError as exc:
        if not seconds:
            raise
        warn(f"cards and links are not measured: {exc.message}")
        speed = Measured(torch="", left_out=(exc.message,))
    speed = replace(speed, image_seconds=seconds)
    try:
        say(f"kept in {keep(machine, speed)}")
    except (OSError, UsageError) as exc:
        warn(f"not kept: {exc}")
    return with_measured(machine, speed)


def measure_images(command: Sequence[str] = (sys.executable, "-I", _IMAGE_PROGRAM)) -> float:
    """Processor seconds of one core for the reference photograph; 0 if it cannot be measured."""
    with (
        under_way("measuring how long a core prepares an image"),
        suppress(ValueError, KeyError, TypeError),
    ):
        return float(json.loads(output_of(command, _IMAGE_SECONDS) or b"")["image"])
    return 0.0


def measure_speed(
    machine: Machine,
    *,
    seconds: float = _SECONDS,
    say: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (sys.executable, "-I", _PROGRAM),
    environ: Mapping[str, str] | None = None,
) -> Measured:
    """Measure the machine's visible GPUs in a separate process.

    Args:
        machine: the machine as NVML shows it.
        seconds: the time after which no further task begins.
        say: a function that gets the words of each result at the end.
        command: the program, for tests.
        environ: the environment, by default the process's own.

    Raises:
        PackageError: torch with CUDA is missing.
        MachineError: nothing could be measured.
    """
    gpus = [machine.gpu(index) for index in machine.visible]
    env = dict(os.environ if environ is None else environ)
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in gpus)
    with under_way("measuring cards and links with torch"):
        text, process = _output_of([*command, str(seconds)], env, seconds + _GRACE)
    results: dict[str, list[Any]] = {}
    for fact in _facts(text):
        field, result, words = _result(fact, [gpu.index for gpu in gpus])
        results.setdefault(field, []).append(result)
        say(words)
    code = process.returncode
    if code is None:
        say(f"warning: process {process.pid} was killed and has not ended: the driver holds it")
    if code == _NO_CUDA:
        raise PackageError(
            "torch with CUDA is not installed beside turbofit: --measure runs it",
            hint="install torch for this machine's CUDA, or plan without --measure",
        )
    torch = "".join(results.pop("torch", []))
    fields: dict[str, Any] = {field: tuple(values) for field, values in results.items()}
    return _as_far_as_it_came(Measured(torch=torch, **fields), code)


def _output_of(
    command: Sequence[str], env: Mapping[str, str], seconds: float
) -> tuple[bytes, subprocess.Popen[bytes]]:
    """The output of a program within so many seconds, and its process, then killed."""
    from tempfile import TemporaryFile  # only a measurement needs it

    # Not a pipe: a process that hangs in the driver survives SIGKILL and keeps its end open.
    with TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_SECONDS)
        output.seek(0)
        return output.read(), process


def _as_far_as_it_came(measured: Measured, code: int | None) -> Measured:
    """The results of a program that ended with this exit code; None: it hangs in the driver.

    Raises:
        MachineError: the program measured nothing.
    """
    if not (measured.cards or measured.pairs or measured.reduces):
        died = f"the measurement {_ended(code)} before its first result"
        raise MachineError(
            died if code != 0 else f"nothing could be measured: {'; '.join(measured.left_out[:3])}",
            hint="turbofit doctor says what is wrong with this machine's CUDA",
        )
    if code != 0:
        return replace(measured, left_out=(*measured.left_out, f"all after it {_ended(code)}"))
    return measured


def _ended(code: int | None) -> str:
    return "hung in the driver" if code is None else f"died with exit code {code}"


def with_measured(machine: Machine, measured: Measured) -> Machine:
    """The machine with its measured speeds; copies that were checked decide on peer access."""
    wrong = {tuple(sorted((pair.source, pair.target))) for pair in measured.pairs if not pair.right}
    links = tuple(_proved(link, measured.pairs) for link in machine.links)
    notes = tuple(
        f"GPU {a} and GPU {b} copy wrong data to each other: they are planned without peer access"
        for a, b in sorted(wrong)
    )
    warnings = (*machine.warnings, *(note for note in notes if note not in machine.warnings))
    return replace(machine, links=links, warnings=warnings, measured=measured)


def _proved(link: Link, pairs: Sequence[PairSpeed]) -> Link:
    """The link, with the peer access that copies in both directions showed.

    One wrong copy is enough to refuse it; a right copy in only one direction changes nothing.
    """
    both = [pair for pair in pairs if {pair.source, pair.target} == {link.a, link.b}]
    right = all(pair.right for pair in both)
    if right and len(both) < 2:
        return link
    peers = right and all(pair.peer for pair in both)
    lanes = link.nvlinks if right else 0
    return replace(link, p2p_read=peers, p2p_write=peers, nvlinks=lanes)


def keep(machine: Machine, measured: Measured) -> Path:
    """Store the results for later plans on the same GPUs; returns the file's path.

    Raises:
        OSError, UsageError: the folder or the file cannot be written.
    """
    path = state_dir("machines") / _name(machine)
    write_atomic(path, to_json(measured))
    return path


def recall(machine: Machine) -> Machine:
    """The machine with stored results for exactly these GPUs; unchanged if there are none."""
    try:
        data = (state_dir("machines", make=False) / _name(machine)).read_bytes()
        return with_measured(machine, decode(data, Measured, what="the measurement"))
    except Exception as exc:  # noqa: BLE001 - a damaged file is as good as none
        _LOG.debug("no measurement of these GPUs is used: %s", exc)
        return machine


def _name(machine: Machine) -> str:
    """The file's name, from the driver, which decides on peer access, and the GPUs' UUIDs.

    It includes each index, since results name GPUs by index: moved cards are measured again.
    """
    gpus = sorted(f"{gpu.index} {gpu.uuid}" for gpu in machine.gpus)
    text = "\n".join([*gpus, str(machine.driver)])
    return f"{digest_of_parts(text)}.json"


def _facts(text: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects in the program's output, without the lines of others."""
    for line in text.splitlines():
        with suppress(ValueError):
            fact = json.loads(line)
            if isinstance(fact, dict):
                yield fact


def _result(fact: Mapping[str, Any], indices: Sequence[int]) -> tuple[str, Any, str]:
    """Convert a line: the field of `Measured` that it belongs to, the value, and its words.

    Indices in the line are CUDA's; they are converted to those of the machine.
    """
    match fact:
        case {"torch": version, "gpus": count}:
            return "torch", str(version), f"torch {version} on {count} GPUs"
        case {"card": place, **figures}:
            card = CardSpeed(index=indices[place], **figures)
            rates = f"{_giga(card.bandwidth)}B/s, {_giga(card.flops)}FLOP/s"
            return "cards", card, f"GPU {card.index}: {rates}"
        case {"pair": [source, target], "peer": peer, **figures}:
            ends = {"source": indices[source], "target": indices[target]}
            pair = PairSpeed(**ends, peer=peer and figures["right"], **figures)
            how = "peer access" if peer else "no peer access"
            how += "" if pair.right else ", WRONG DATA"
            rate = f"{_giga(pair.bandwidth)}B/s"
            return "pairs", pair, f"GPU {pair.source} to {pair.target}: {rate}, {how}"
        case {"reduce": group, **figures}:
            reduce = ReduceSpeed(gpus=tuple(indices[i] for i in group), **figures)
            over = "+".join(map(str, reduce.gpus))
            spent = f"{reduce.seconds * 1e6:.0f} us"
            return "reduces", reduce, f"all-reduce of {reduce.size:,} bytes over {over}: {spent}"
    name, of = fact.get("left_out") or fact.get("failed"), fact.get("of") or ()
    # The GPUs of a task: ``[0]``, ``[0, 1]``, or ``[[0, 1]]`` for a group.
    numbers = of[0] if of and isinstance(of[0], list) else of
    gpus = "+".join(str(indices[i]) for i in numbers)
    words = f"{name} of GPU {gpus}: {fact.get('why', 'no time left')}"
    return "left_out", words, words


def _giga(value: float) -> str:
    return f"{value / 1e9:,.0f} G"
