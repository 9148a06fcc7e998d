"""`turbofit machine`, `models` and `gpus`: what was measured, and what has a name."""

from __future__ import annotations

import json
import resource

import pytest

from turbofit.cli.main import main
from turbofit.core.errors import PackageError
from turbofit.core.machine import CardSpeed, Machine, Measured
from turbofit.core.process.files import state_dir
from turbofit.core.struct import decode
from turbofit.machine import source, speed
from turbofit.machine.spec import parse_spec


def test_a_machine_is_shown_saved_and_read_again(tmp_path, capsys) -> None:
    path = tmp_path / "machine.json"
    assert main(["machine", "--on", "2xl4:free=19GiB", "--save", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    shown = decode(captured.out, Machine, what="machine")
    assert len(shown.gpus) == 2
    assert str(path) in captured.err
    assert main(["machine", "--on", str(path), "--json"]) == 0
    assert decode(capsys.readouterr().out, Machine, what="machine").gpus == shown.gpus
    assert main(["machine", "--on", "2xl4", "--save", "/no/such/folder/x"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["machine", "--on", "2xl4", "--measure"]) == 2
    assert "--measure measures this machine" in capsys.readouterr().err


def test_a_measurement_that_cannot_be_kept_is_shown(monkeypatch, capsys) -> None:
    on = parse_spec("1xl4")
    found = Measured(torch="2.9", cards=(CardSpeed(index=0, bandwidth=3e11, flops=1e14),))
    monkeypatch.setattr(source, "machine_from", lambda *_, **__: on)
    monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: found)
    monkeypatch.setattr(speed, "measure_images", lambda: 0.0)
    (state_dir("machines") / speed._name(on)).mkdir()
    assert main(["machine", "--measure"]) == 0
    told = capsys.readouterr()
    assert "not kept: " in told.err
    assert "L4" in told.out


def test_a_core_is_measured_and_kept_where_no_torch_measures_the_card(monkeypatch, capsys) -> None:
    on = parse_spec("2xl4")

    def no_torch(*_: object, **__: object) -> Measured:
        raise PackageError("torch with CUDA is not installed", hint="install it")

    monkeypatch.setattr(source, "machine_from", lambda *_, **__: on)
    monkeypatch.setattr(speed, "measure_speed", no_torch)
    monkeypatch.setattr(speed, "measure_images", lambda: 0.05)
    assert main(["machine", "--measure"]) == 0
    told = capsys.readouterr()
    assert "50 ms for an image of 1920x1080" in told.err
    assert "cards and links are not measured: torch with CUDA is not installed" in told.err
    assert "a core 50 ms" in " ".join(told.out.split())
    kept = speed.recall(on).measured
    assert kept is not None
    assert (kept.image_seconds, kept.cards) == (0.05, ())
    monkeypatch.setattr(speed, "measure_images", lambda: 0.0)
    assert main(["machine", "--measure"]) == 7


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


@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr("turbofit.cli.terminal.screen.is_terminal", lambda _: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["models"]) == 0
    told = capsys.readouterr()
    lines = told.out.partition("Not planned for")[0].splitlines()
    assert max(map(len, lines)) <= columns
    assert ("hub id" in lines[1]) is ("hub ids are left out" not in told.err)
    assert ("hub id" in lines[1]) is (columns == 200)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["4090"], {"rtx4090", "rtx4090-48g", "rtx4090d"}),
        (["RTX 3080"], {"rtx3080", "rtx3080-12g", "rtx3080ti"}),
        (["a100", "80gb"], {"a100-80g", "a100-pcie-80g"}),
        (["turing"], {"t4", "rtx2080ti", "rtx2080ti-22g"}),
    ],
)
def test_words_show_the_cards_that_have_them(words: list[str], names: set[str], capsys) -> None:
    assert main(["gpus", *words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["gpus"]) == names


def test_a_word_shows_the_models_that_have_it(capsys) -> None:
    assert main(["models", "awq"]) == 0
    planned, unsupported = capsys.readouterr().out.split("\n\n")
    heading, columns, *rows = planned.splitlines()
    assert (heading, "hub id" in columns, len(rows) > 5) == ("Models", True, True)
    assert all("awq" in row.lower() for row in rows)
    title, *reasons = unsupported.split("\n  - ")
    assert (title, len(reasons) > 2) == ("Not planned for", True)
    assert all("awq" in reason.partition(":")[0] for reason in reasons)
    assert main(["models", "internvl2-8b", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert models["internvl2-8b"]["parameters"] == 8_075_365_376
    assert main(["gpus", "titan", "rtx"]) == 2  # a card without a preset, as a plan answers
    assert "titanrtx:total=" in capsys.readouterr().err
