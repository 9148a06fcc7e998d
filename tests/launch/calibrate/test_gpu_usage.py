"""What each step of a calibration reads: of GPUs by NVML, and of a pretend card's account."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.api import plan
from turbofit.core.errors import MachineError
from turbofit.core.units import MIB
from turbofit.launch import calibrate as calibrator
from turbofit.launch.calibrate import NvmlUsageReader, PretendUsageReader
from turbofit.launch.engine.pretended import PretendReader, pretend_machine
from turbofit.observe.sampler import Memory, SampledRange
from turbofit.pretend import timeline as timelines


def allocated(size: int, held: int, address: str) -> str:
    return f"A 0 0 -1 {size} {held} {address}\n"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The events that were read from any timeline."""
    found: list[Any] = []
    event = timelines._event

    def counted(line: str) -> Any:
        found.append(line)
        return event(line)

    monkeypatch.setattr(timelines, "_event", counted)
    # Any library will do: these events have no traces.
    library = Path(sys.executable).resolve()
    monkeypatch.setattr(
        import_module("turbofit.rehearse.packages"), "engine_library", lambda: library
    )
    return found


def test_each_step_reads_only_what_is_new(taken: list[Any], tmp_path: Path) -> None:
    made = plan("internvl2-8b", on="1xrtx3090")
    gpu = pretend_machine(made, 0).gpus[0]
    others = gpu.used + gpu.late
    path = tmp_path / "timeline"
    engine: Any = SimpleNamespace(group=0, pretended=PretendReader(made, 0, path))
    usage = PretendUsageReader(made)
    text = (
        "P context\n" + allocated(50 * MIB, 50 * MIB, "a1") + f"F a1 0\n{allocated(MIB, MIB, 'a2')}"
    )
    path.write_text(text)
    (loaded,) = usage.read(engine).values()
    assert (loaded.peak, loaded.last) == (others + MIB, others + MIB)
    assert len(taken) == 4
    path.write_text(text + allocated(80 * MIB, 81 * MIB, "a3") + f"F a3 {MIB}\n")
    (worst,) = usage.read(engine).values()
    assert (worst.peak, worst.last) == (others + 81 * MIB, others + MIB)
    assert len(taken) == 6
    # A new start has a timeline of its own.
    engine.pretended = PretendReader(made, 0, tmp_path / "another")
    with pytest.raises(MachineError, match="account cannot be read"):
        usage.read(engine)
    (tmp_path / "another").write_text("P context\n" + allocated(MIB, 2 * MIB, "b1"))
    (again,) = usage.read(engine).values()
    assert again.last == others + 2 * MIB


def test_an_event_that_cannot_be_read_is_read_again_from_the_beginning(
    taken: list[Any], tmp_path: Path
) -> None:
    made = plan("internvl2-8b", on="1xrtx3090")
    path = tmp_path / "timeline"
    engine: Any = SimpleNamespace(group=0, pretended=PretendReader(made, 0, path))
    usage = PretendUsageReader(made)
    path.write_text("P context\nA 0 0 -1 nonsense\n")
    with pytest.raises(MachineError):
        usage.read(engine)
    path.write_text("P context\n" + allocated(MIB, MIB, "a1"))
    assert 0 in usage.read(engine)


class Samples:
    """A `Sampler` whose only samples came at these seconds."""

    def __init__(self, *at: float) -> None:
        self.at = at

    def between(self, _: str, begin: float, end: float) -> SampledRange | None:
        inside = [at for at in self.at if begin <= at <= end]
        return SampledRange(peak=MIB, last=MIB) if inside else None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("last", "read"), [(9.9, True), (9.0, False)])
def test_a_gpu_that_answers_no_more_is_not_read_by_its_last_answer(
    monkeypatch: pytest.MonkeyPatch, last: float, read: bool
) -> None:
    # The worst case may have come after it.
    clock = SimpleNamespace(monotonic=lambda: 10.0, sleep=lambda _: None)
    monkeypatch.setattr(calibrator, "time", clock)
    monkeypatch.setattr(calibrator, "memory_now", lambda _: Memory(2 * MIB, MIB, MIB))
    monkeypatch.setattr(calibrator, "Sampler", lambda _: Samples(1.0, last))
    usage = NvmlUsageReader(plan("internvl2-8b", on="1xrtx3090"))
    usage._since = {0: 0.0}
    engine: Any = SimpleNamespace(group=0)
    if read:
        assert usage.read(engine) == {0: SampledRange(peak=MIB, last=MIB)}
    else:
        with pytest.raises(MachineError, match="did not answer"):
            usage.read(engine)
