"""`turbofit diagnose` and `turbofit doctor` as people call them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.logs.conftest import LOGS
from turbofit.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_diagnose_a_file(capsys) -> None:
    code, out, err = run(capsys, "diagnose", str(LOGS / "case1_internvl_torchrun.log"))
    assert (code, err) == (0, "")
    for words in ("What would have worked", "Lines that prove this answer", "Who held the memory",
                  "556 MiB", "lmdeploy serve api_server"):  # fmt: skip
        assert words in out
    assert max(map(len, out.splitlines())) <= 100


def test_diagnose_stdin_and_unknown(capsys, monkeypatch) -> None:
    """A pipe needs no word for it."""
    for words in (("diagnose", "-"), ("diagnose",)):
        read = SimpleNamespace(buffer=io.BytesIO(b"nothing known\n"), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", read)
        code, out, _ = run(capsys, *words)
        assert code == 3
        assert "recognises no error" in out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    code, _, err = run(capsys, "diagnose")
    assert (code, err) == (
        2,
        "error: LOG is missing\nhint: for example: turbofit diagnose server.log\n",
    )


def test_diagnose_wrong_use(capsys) -> None:
    code, _, err = run(capsys, "diagnose", "/no/such/file")
    assert code == 2
    assert "cannot be read" in err
    assert run(capsys, "diagnose", str(LOGS / "case3_llava_l4.log"), "--on", "9xnothing")[0] == 2


def test_doctor_without_a_gpu(capsys) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    document = json.loads(out)
    assert document["schema"] == "turbofit.doctor/1"
    if document["machine"] is None:
        assert code == 4
    assert {one["state"] for one in document["findings"]} <= {
        "ok", "warning", "stops", "unreadable",
    }  # fmt: skip


def test_doctor_on_a_described_machine(capsys) -> None:
    code, out, _ = run(capsys, "doctor", "--on", "4xrtx3090", "--model", "internvl2-8b")
    assert code in (0, 3)
    assert "peer_access: no peer access: all pairs" in out
    assert "\n  fix  " in out
    assert run(capsys, "doctor", "--on", "no/such/snapshot.json")[0] == 2


def test_diagnose_takes_the_release_that_a_log_does_not_print(tmp_path, capsys) -> None:
    log = tmp_path / "serve.log"
    log.write_text(
        "lmdeploy serve api_server OpenGVLab/InternVL2-4B --tp 2\n"
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a"
        " total capacity of 23.69 GiB of which 556.00 MiB is free.\n"
    )
    main(["diagnose", str(log), "--on", "2xrtx3090"])
    assert "the release of LMDeploy: 0.18 is assumed" in " ".join(capsys.readouterr().out.split())
    main(["diagnose", str(log), "--on", "2xrtx3090", "--lmdeploy", "0.6.1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["read"]["version"] == "0.6.1"
    assert not any("the release of LMDeploy" in text for text in found["unknown"])
    assert main(["diagnose", str(log), "--lmdeploy", "main"]) == 2


def test_an_article_is_no_log_and_a_picture_neither(tmp_path, capsys) -> None:
    article = tmp_path / "article.txt"
    article.write_text(
        "We serve InternVL2-8B on four cards. It crashed at night. Nobody knows why it did.\n"
        "The fans were loud. We asked a friend. The model is large.\n"
    )
    log = tmp_path / "log.txt"
    log.write_text("loading\nloading weights: 10 of 30\nloading weights: 20 of 30\n")
    picture = tmp_path / "a.jpg"
    picture.write_bytes(bytes.fromhex("ffd8ffe000104a464946"))
    wide = tmp_path / "wide.txt"
    wide.write_text("RuntimeError: CUDA error: out of memory\n", encoding="utf-16")
    for path, code in ((article, 2), (log, 3), (picture, 2), (Path(sys.executable), 2)):
        assert main(["diagnose", str(path)]) == code, path
    told = capsys.readouterr().err
    assert "here is none" in told
    assert "turbofit plan InternVL2-8B" in told
    assert told.count("is no log") == 2
    assert main(["diagnose", str(wide)]) == 0
