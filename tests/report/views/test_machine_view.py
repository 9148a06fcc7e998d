from __future__ import annotations

from msgspec.structs import replace

from tests.support.plans import machine
from turbofit.core.machine import CardSpeed, Holder, Machine, Measured, PairSpeed
from turbofit.machine.spec import parse_spec
from turbofit.report.painters.terminal import paint
from turbofit.report.views.machine_view import machine_view


def lines(found: Machine) -> list[str]:
    return paint(machine_view(found), short=True).splitlines()


def test_equal_gpus_are_one_row() -> None:
    eight = lines(parse_spec("8xa100-80g"))
    assert len(eight) <= 10
    assert sum("A100" in line for line in eight) == 1
    assert any(line.split()[0] == "0-7" for line in eight)
    assert max(map(len, eight)) <= 80
    mixed = lines(parse_spec("rtx3090+2xrtx4090"))
    assert [line.split()[0] for line in mixed if "GeForce" in line] == ["0", "1-2"]


def test_holders_are_the_first_few_and_warnings_all() -> None:
    holders = tuple(Holder(pid=pid, name=f"python{pid}", bytes=pid << 30) for pid in range(1, 6))
    found = machine(2)
    held = replace(found.gpus[1], holders=holders)
    warnings = tuple(f"warning {number}" for number in range(5))
    text = "\n".join(lines(replace(found, gpus=(found.gpus[0], held), warnings=warnings)))
    assert "python5 (5) 5.0 GiB of GPU 1; python4 (4) 4.0 GiB of GPU 1;" in text
    assert "2 more" in text
    assert all(warning in text for warning in warnings)


def test_what_was_measured_is_told_by_the_slowest() -> None:
    measured = Measured(
        torch="2.12.1",
        cards=(
            CardSpeed(index=0, bandwidth=8e11, flops=7e13),
            CardSpeed(index=1, bandwidth=7e11, flops=8e13),
        ),
        pairs=(
            PairSpeed(
                source=0, target=1, bandwidth=2e10, host_bandwidth=1e10, latency=1e-5, peer=True,
                right=False,
            ),
        ),
    )  # fmt: skip
    text = " ".join("\n".join(lines(replace(machine(2), measured=measured))).split())
    assert "a card at least 700 GB/s, 70.0 TFLOP/s; a pair at least 20.0 GB/s" in text
    assert "1 pairs copy wrong data" in text
