"""`turbofit machine`: what was measured is shown, kept or not."""

from __future__ import annotations

import resource

from turbofit.cli.main import main
from turbofit.core.machine import CardSpeed, Measured
from turbofit.core.process.files import state_dir
from turbofit.machine import source, speed
from turbofit.machine.spec import parse_spec


def test_a_measurement_that_cannot_be_kept_is_shown(monkeypatch, capsys) -> None:
    on = parse_spec("1xl4")
    found = Measured(torch="2.9", cards=(CardSpeed(index=0, bandwidth=3e11, flops=1e14),))
    monkeypatch.setattr(source, "machine_from", lambda *_, **__: on)
    monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: found)
    (state_dir("machines") / speed._name(on)).mkdir()
    assert main(["machine", "--measure"]) == 0
    told = capsys.readouterr()
    assert "not kept: " in told.err
    assert "L4" in told.out


def test_a_disk_that_is_full_leaves_the_snapshot_that_was_there(tmp_path, capsys) -> None:
    kept = tmp_path / "card.json"
    kept.write_text("the old snapshot")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code = main(["machine", "--on", "1xl4", "--save", str(kept)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "card.json cannot be written: File too large" in capsys.readouterr().err
    assert kept.read_text() == "the old snapshot"
    assert list(tmp_path.iterdir()) == [kept]
