"""The time of a pretend card: launches tell what a forward does, and who synchronises waits."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.rehearsal.pretend.child import Machine, make
from turbofit.rehearsal.pretend.clock import CLOCK, ClockFile, ClockReading, StepTable

#: A forward over N tokens takes N / 1000 seconds here, an image of N units N / 100.
TABLE = StepTable(
    forward=[n / 1000 for n in range(200)],
    image=[n / 100 for n in range(200)],
    pair=1e-4,
    context=1e-5,
)
#: The kernels of a forward, launched as TurboMind launches them.
FORWARDS = """
void = ctypes.c_void_p
class Grid(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]
NAMES = ("patchIm2ColKernel", "buildMappedIdxBatchedKernel", "BatchPrefixSumKernel",
         "embeddingLookupKernel", "ProcessKV_v2", "length_criterion_v2", "another")
for place, name in enumerate(NAMES):
    rt.__cudaRegisterFunction(None, void(place + 1), None, b"_ZN9turbomind" + name.encode(), 0,
                              None, None, None, None, None)
rt.cudaLaunchKernel.argtypes = [void, Grid, Grid, void, ctypes.c_size_t, void]

def stream():
    made = void()
    assert rt.cudaStreamCreate(byref(made)) == 0
    return made

def launch(name, grid, where, *arguments):
    held = [argument if isinstance(argument, ctypes._SimpleCData) else
            ctypes.cast(argument, void) for argument in arguments]
    pointers = (void * max(1, len(held)))(*[ctypes.cast(ctypes.pointer(one), void) for one in held])
    number = NAMES.index(name) + 1
    assert rt.cudaLaunchKernel(number, Grid(*grid), Grid(1, 1, 1), pointers, 0, where) == 0

def forward(where, lengths, prompts=()):
    '''One forward: answers first, then the prompts, each with so many new tokens.'''
    tokens, ends = len(lengths) - len(prompts) + sum(prompts), [5]
    for size in prompts:
        ends.append(ends[-1] + size)
    values, ends = (ctypes.c_int * len(lengths))(*lengths), (ctypes.c_int * len(ends))(*ends)
    launch("BatchPrefixSumKernel", (1, 1, 1), where, values, ctypes.c_int(len(lengths)))
    launch("embeddingLookupKernel", (tokens, 1, 1), where)
    for layer in range(3 if prompts else 0):
        launch("ProcessKV_v2", (1, 1, len(prompts)), where, *[void()] * 5, ends)
    launch("another", (7, 7, 7), where)
"""


@pytest.fixture
def clocked(libraries: Path, tmp_path: Path) -> Any:
    """Runs forwards on a machine with the table above, and returns what passed."""
    machine, clock = make(libraries, tmp_path), ClockFile(tmp_path / "clock", 2.0)
    clock.write(TABLE)

    def ran(code: str, *, runs: bool = True) -> tuple[ClockReading, Any]:
        if runs:
            clock.run()
        value = machine.run(FORWARDS + dedent(code), **{CLOCK: str(clock.path)})
        return clock.read(), value

    return ran


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        ("forward(s, [40])", 0.001 + 40e-5),
        ("forward(s, [40, 60, 80])", 0.003 + 180e-5),
        ("forward(s, [50], [50])", 0.050 + 50 * 50 / 2 * 1e-4),
        ("forward(s, [90], [50])", 0.050 + 50 * (90 - 25) * 1e-4),
        ("forward(s, [40, 60, 10, 20], [10, 20])", 0.032 + (50 + 200) * 1e-4 + 100e-5),
        ("launch('patchIm2ColKernel', (9, 1024, 1), s)", 0.09),
        ("launch('embeddingLookupKernel', (99, 1, 1), s)", 0.0),
        ("forward(None, [40])", 0.0),
    ],
)
def test_a_forward_takes_what_the_table_says(work: str, seconds: float, clocked: Any) -> None:
    """A tower's own table is no forward, and a default stream has no time."""
    reading, _ = clocked(f"s = stream()\n{work}\ndone(0)")
    assert reading.busy == pytest.approx(seconds, abs=1e-6)
    assert (reading.factor, reading.idle, reading.late) == (2.0, 0.0, 0.0)
    assert reading.forwards == ("forward(s" in work)


def test_images_of_patches_are_counted_by_their_frames(clocked: Any) -> None:
    code = """
    grids = (ctypes.c_int * 6)(1, 4, 6, 3, 2, 5)
    launch("buildMappedIdxBatchedKernel", (2, 1, 1), stream(), void(), grids)
    done(0)
    """
    assert clocked(code)[0].busy == pytest.approx(0.24 + 3 * 0.10)


def test_who_synchronises_waits_and_who_launches_does_not(clocked: Any) -> None:
    """Through an event that another stream waits for, twice as long as the table says."""
    code = """
    s, other, e = stream(), stream(), void()
    assert rt.cudaEventCreate(byref(e)) == 0
    began = time.monotonic()
    forward(s, [10, 10], [5])
    launched = time.monotonic()
    assert rt.cudaStreamSynchronize(other) == 0
    free_at = time.monotonic()
    assert rt.cudaEventRecord(e, s) == rt.cudaStreamWaitEvent(other, e, 0) == 0
    assert rt.cudaStreamSynchronize(other) == rt.cudaEventSynchronize(e) == 0
    done([began, launched, free_at, time.monotonic()])
    """
    reading, (began, launched, free_at, ended) = clocked(code)
    assert began + 2 * reading.busy <= reading.until <= launched + 2 * reading.busy
    assert free_at < reading.until <= ended
    assert 0 <= reading.late <= ended - reading.until


def test_a_card_that_waits_for_the_host_between_forwards_is_noticed(clocked: Any) -> None:
    code = """
    s = stream()
    lengths, most = (ctypes.c_int * 2)(5, 5), (ctypes.c_int * 2)(9, LIMIT)
    ended = (ctypes.c_bool * 2)()
    forward(s, [5, 5])
    launch("length_criterion_v2", (1, 1, 1), s, ended, lengths, most, ctypes.c_int(2))
    rt.cudaStreamSynchronize(s)
    before = time.monotonic()
    while time.monotonic() < before + 0.02:
        pass
    forward(s, [6, 6])
    done([lengths[0], ended[1]])
    """
    reading, value = clocked(code.replace("LIMIT", "9"))
    assert value == [6, False]
    assert reading.idle >= 0.02
    after, value = clocked(code.replace("(9, LIMIT)", "(6, 6)"))
    assert value == [6, True]
    assert after.idle == reading.idle  # all had ended: it waited for clients


def test_without_a_clock_nothing_takes_time(clocked: Any, libraries: Path, tmp_path: Path) -> None:
    code = "s = stream()\nforward(s, [10], [9])\nrt.cudaStreamSynchronize(s)\ndone(0)"
    assert clocked(code, runs=False)[0] == ClockReading()
    assert Machine(libraries, tmp_path).run(FORWARDS + code) == 0
    assert ClockFile(tmp_path / "none").read() == ClockReading()
