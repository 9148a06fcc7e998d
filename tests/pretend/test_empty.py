"""A launch of a kernel that holds no code for the card ends the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretend.child import CARD, run
from turbofit.pretend import scenario as module
from turbofit.pretend.scenario import PretendGpu, Scenario

LAUNCH = """
    def register(host, name):
        rt.__cudaRegisterFunction(None, void_p(host), name, name, 0, *[None] * 5)

    def launch(host):
        return rt.cudaLaunchKernelExC(None, void_p(host), None)

    free()  # a card in use has a timeline
    register(1, b"full")
    register(2, b"hollow")
    register(3, b"hollowed")
"""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose kernel `hollow` is empty on Ampere."""
    names = tmp_path / "empty.txt"
    names.write_text("another\nhollow\nlast\n")
    monkeypatch.setattr(
        module, "empty_kernels_file", lambda capability: names if capability[0] == 8 else None
    )


def test_other_kernels_are_launched(libraries: Path, tmp_path: Path, empty: None) -> None:
    ran = run(libraries, tmp_path, f"{LAUNCH}\n    done([launch(1), launch(3), launch(9)])")
    assert ran.value == [0, 0, 0]


def test_an_empty_kernel_ends_the_process(libraries: Path, tmp_path: Path, empty: None) -> None:
    with pytest.raises(AssertionError) as caught:
        run(libraries, tmp_path, f"{LAUNCH}\n    launch(2)")
    assert (
        f"turbofit pretend: {CARD.name} (compute capability 8.6) has no code for the kernel hollow:"
        " it is empty"
    ) in str(caught.value)


def test_a_card_that_has_the_code(libraries: Path, tmp_path: Path, empty: None) -> None:
    hopper = PretendGpu("Pretend H100", total=CARD.total, sm=(9, 0))
    ran = run(libraries, tmp_path, f"{LAUNCH}\n    done(launch(2))", Scenario((hopper,)))
    assert ran.value == 0
