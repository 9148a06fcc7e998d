"""What a measurement says, what is believed of it, and what a later plan makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.pretend.cuda_torch import CUDA_PATH, run
from tests.support.waiting import HANG, until
from turbofit.core.errors import MachineError, PackageError
from turbofit.core.machine import Machine
from turbofit.core.struct import decode, to_json
from turbofit.machine import speed
from turbofit.machine.spec import parse_spec
from turbofit.machine.speed import keep, measure_images, measure_speed, recall, with_measured
from turbofit.tuner.speed import LinkClass, all_reduce_of, card_of, group_class, rates

PROGRAM = Path(speed.__file__).with_name("speed_program.py")


def machine(spec: str = "2xrtx3090") -> Machine:
    made = parse_spec(spec)
    return replace(made, gpus=tuple(replace(g, uuid=f"GPU-{g.index}") for g in made.gpus))


def pair(source: int, target: int, **changes: Any) -> dict[str, Any]:
    facts = {"peer": True, "right": True, "bandwidth": 2e10, "latency": 1e-5, "host_bandwidth": 8e9}
    return {"pair": [source, target], **facts, **changes}


def lines_of(*pairs: dict[str, Any], reduces: tuple[tuple[int, float], ...] = ()) -> list[Any]:
    cards = [{"card": i, "bandwidth": 8.4e11, "flops": 5.6e13} for i in (0, 1)]
    whole = {"reduce": [0, 1], "right": True}
    sums = [{**whole, "size": size, "seconds": seconds} for size, seconds in reduces]
    return [{"torch": "2.9", "gpus": 2}, *cards, *pairs, *sums]


def measure(tmp_path: Path, facts: list[Any], on: Machine, ending: str = "", **options: Any):
    script = tmp_path / "program.py"
    text = "\n".join(fact if isinstance(fact, str) else json.dumps(fact) for fact in facts)
    script.write_text(f"import os, sys, time\nprint({text!r}, flush=True)\n{ending}\n")
    return measure_speed(on, command=[sys.executable, str(script)], **options)


def test_every_line_is_kept_under_the_machines_own_indices(tmp_path) -> None:
    on = replace(machine("3xrtx3090"), visible=(2, 0))
    said: list[str] = []
    facts = [*lines_of(pair(0, 1), pair(1, 0)), "noise", {"failed": "reduce", "of": [[0, 1]]}]
    ending = "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    found = measure(tmp_path, facts, on, ending, say=said.append)
    assert [one.index for one in found.cards] == [2, 0]
    assert [(one.source, one.target) for one in found.pairs] == [(2, 0), (0, 2)]
    assert found.torch == "2.9"
    assert found.left_out == ("reduce of GPU 2+0: no time left",)
    assert [word.partition(":")[0] for word in said if word.startswith("GPU")] == [
        "GPU 2", "GPU 0", "GPU 2 to 0", "GPU 0 to 2",
    ]  # fmt: skip
    assert any("peer access" in word for word in said)
    assert decode(to_json(found), speed.Measured, what="x") == found


def test_peers_are_those_that_a_checked_copy_proved(tmp_path) -> None:
    def after(on: Machine, *pairs: dict[str, Any]) -> Machine:
        return with_measured(on, measure(tmp_path, lines_of(*pairs), on))

    promised, denied = machine("2xrtx3090,p2p=all"), machine("2xrtx3090,p2p=none")
    for second, peers in (
        (pair(1, 0), True), (pair(1, 0, peer=False), False), (pair(1, 0, right=False), False),
    ):  # fmt: skip
        found = after(promised, pair(0, 1), second)
        assert found.link(0, 1).peers is peers
        assert ("wrong data" in " ".join(found.warnings)) is (second["right"] is False)
    alone = after(promised, pair(0, 1, right=False))
    assert not alone.link(0, 1).peers, "one wrong copy is enough"
    found = after(denied, pair(0, 1), pair(1, 0))
    assert group_class(found, found.gpus) == LinkClass.PCIE_PEER
    assert not after(denied, pair(0, 1)).link(0, 1).peers


def test_measured_rates_take_the_place_of_assumed_ones(tmp_path) -> None:
    on = machine()
    times = ((8192, 2e-5), (1 << 20, 1.2e-4), (32 << 20, 3.2e-3))
    facts = lines_of(reduces=times)
    found = with_measured(on, measure(tmp_path, facts, on))
    own = all_reduce_of(found, found.gpus, rates())
    for size, seconds in (times[0], times[2]):
        assert own.seconds(size) == pytest.approx(seconds, rel=0.01)
    card = card_of(found.gpus, rates(), found.measured)
    assert card.bandwidth == pytest.approx(8.4e11 / 0.9 * rates().memory_efficiency)
    assert card.flops == pytest.approx(5.6e13 / 0.75 * rates().compute_efficiency)
    wrong = [{**fact, "right": False} if "reduce" in fact else fact for fact in facts]
    unbelieved = with_measured(on, measure(tmp_path, wrong, on))
    assert all_reduce_of(unbelieved, on.gpus, rates()) == all_reduce_of(on, on.gpus, rates())


def test_the_right_pair_is_chosen_where_links_differ(tmp_path) -> None:
    on = machine("4xrtx3090")
    fast = {(0, 2), (1, 3)}
    facts = [
        {"reduce": [a, b], "size": size, "right": True,
         "seconds": 1e-5 + size * (5e-11 if (a, b) in fast else 2e-9)}
        for a, b in combinations(range(4), 2) for size in (8192, 1 << 20)
    ]  # fmt: skip
    found = with_measured(on, measure(tmp_path, facts, on))
    asked = {"model": "qwen2.5-14b", "tp": 2, "replicas": 2}
    plan = turbofit.plan(on=found, **asked)
    assert "as measured here with torch" in plan.throughput.basis
    assert {tuple(sorted(group)) for group in plan.parallel.groups} == fast
    assert turbofit.plan(on=on, **asked).parallel.groups == ((0, 1), (2, 3))


def test_it_is_kept_for_these_gpus_and_this_driver(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    on = machine()
    assert recall(on) == on
    assert not (tmp_path / "state").exists()
    found = measure(tmp_path, lines_of(pair(0, 1), pair(1, 0)), on)
    path = keep(on, found)
    assert recall(on).measured == found
    assert recall(replace(on, driver="1.2")).measured is None
    assert recall(machine("1xrtx3090")).measured is None
    first, second = on.gpus
    swapped = (replace(first, uuid=second.uuid), replace(second, uuid=first.uuid))
    assert recall(replace(on, gpus=swapped)).measured is None
    path.write_text("{")
    assert recall(on) == on


def test_failures_are_plain(tmp_path) -> None:
    on = machine()
    with pytest.raises(PackageError, match="torch with CUDA"):
        measure(tmp_path, [], on, "sys.exit(3)")
    with pytest.raises(MachineError, match="exit code -9"):
        measure(tmp_path, [{"torch": "2", "gpus": 2}], on, "os.kill(os.getpid(), 9)")
    full = [{"failed": "card", "of": [i], "why": "CUDA out of memory"} for i in (0, 1)]
    with pytest.raises(MachineError, match="nothing could be measured: card of GPU 0: CUDA out"):
        measure(tmp_path, [{"torch": "2", "gpus": 2}, *full], on)
    found = measure(tmp_path, lines_of(), on, "os._exit(7)")
    assert len(found.cards) == 2
    assert found.left_out == ("all after it died with exit code 7",)


def test_a_program_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    printed, real = tmp_path / "printed", subprocess.Popen.wait

    def wait(process: subprocess.Popen[bytes], timeout: float) -> int:
        if timeout != 7.0 + speed._GRACE:
            return real(process, timeout)
        until(printed.exists, "the results")
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    hang = f"open({str(printed)!r}, 'w'); import signal; signal.pause()"
    found = measure(tmp_path, lines_of(), machine(), hang, seconds=7.0)
    assert found.left_out == ("all after it died with exit code -9",)
    assert len(found.cards) == 2


@pytest.mark.slow
@pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")
def test_the_program_itself_runs_on_pretend_gpus_and_is_not_deceived(tmp_path) -> None:
    program = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    ran = run(tmp_path / "run", program, on="2xrtx3090", seconds=5 * HANG)
    facts = [json.loads(line) for line in ran.text.splitlines() if line.startswith("{")]
    kinds = [next(iter(fact)) for fact in facts]
    assert kinds == ["torch", "card", "card", "pair", "pair", "reduce", "reduce", "reduce"]
    # No kernel computes there, so no copy's bytes arrive: it must say so.
    assert [fact["right"] for fact in facts if "pair" in fact] == [False, False]


def test_what_the_driver_holds_is_not_waited_for(tmp_path, monkeypatch) -> None:
    """SIGKILL does not end it, and its end of the pipe stays open."""
    monkeypatch.setattr(speed, "_GRACE", 0.0)
    monkeypatch.setattr(speed, "_LAST_SECONDS", 0.0)
    monkeypatch.setattr("subprocess.Popen.kill", lambda _: None)
    go, said = tmp_path / "go", []
    go.touch()
    ending = f"while os.path.exists({str(go)!r}): time.sleep(0.01)"
    try:
        with pytest.raises(MachineError, match="hung in the driver before its first result"):
            measure(tmp_path, [], machine(), ending, seconds=0.0, say=said.append)
    finally:
        go.unlink()
    assert "was killed and has not ended: the driver holds it" in said[0]


def test_a_core_is_measured_without_torch_and_without_a_card() -> None:
    """The reference photograph takes milliseconds to seconds of any core."""
    assert 0.001 < measure_images() < 10


@pytest.mark.parametrize("ending", ["sys.exit(3)", "print('{}')", "print('no JSON')"])
def test_a_host_that_cannot_be_measured_counts_as_a_usual_one(ending: str) -> None:
    assert measure_images([sys.executable, "-c", f"import sys; {ending}"]) == 0.0
