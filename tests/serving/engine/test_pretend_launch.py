"""An engine on pretend GPUs: each start has a machine and a clock of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import turbofit
from tests.rehearsal.pretend.child import ask, make, tell
from tests.support.waiting import HANG
from turbofit.core.units import MIB
from turbofit.planning.commands import commands
from turbofit.rehearsal.planned import charged
from turbofit.rehearsal.pretend.build import build
from turbofit.rehearsal.pretend.clock import CLOCK
from turbofit.serving.engine.pretend_launch import PretendLaunch, PretendReader, with_checkpoint


@pytest.mark.lmdeploy
def test_each_start_has_a_machine_and_a_clock_of_its_own(tmp_path: Path) -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    launch = PretendLaunch(commands(plan)[0], ("run",), plan=plan, folder=tmp_path, factor=2.0)
    first = launch.start_command(0)
    machine = tmp_path / "0-0"
    assert (first.env[CLOCK], first.machine) == (str(machine / "clock"), machine)
    (usage,) = PretendReader(plan, 0, machine).usages()
    assert usage.peak == usage.in_use == charged(plan).gpus[0].used  # nothing yet
    assert launch.start_command(1).machine == tmp_path / "0-1"
    assert not (tmp_path / "0-0").exists()  # timelines are large
    # A start that failed, on a full disk perhaps, comes again with the same number.
    (tmp_path / "0-1" / "clock").unlink()
    assert Path(launch.start_command(1).env[CLOCK]).exists()
    # LMDeploy chooses a chat template by the folder's name.
    assert with_checkpoint(plan, tmp_path).model.source.checkpoint == f"{tmp_path}/InternVL2-2B"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_what_only_a_real_card_has_is_counted_once(tmp_path: Path) -> None:
    """The shared file has the late bytes in its peak: CogVLM's were told 256 MiB too many."""
    plan = turbofit.plan("qwen2-vl-2b", on="1xrtx3060", engine="pytorch")
    (gpu,), reader = charged(plan).gpus, PretendReader(plan, 0, tmp_path)
    machine = make(build(), tmp_path, charged(plan))
    engine = machine.start("a = malloc(100); free(); malloc(50); rt.cudaFree(a); say(); wait()")
    ask(engine)
    (usage,) = reader.usages()
    tell(engine)
    engine.communicate(timeout=HANG)
    held = gpu.used + gpu.late + charged(plan).context
    assert gpu.late > 0
    assert (usage.peak, usage.in_use) == (held + 150 * MIB, held + 50 * MIB)
