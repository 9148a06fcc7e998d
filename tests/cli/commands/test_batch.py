"""`turbofit batch` on the command line."""

from __future__ import annotations

import json

from tests.batch_jobs.standin import StandIn, lines, write_requests
from turbofit.cli.main import main


def test_the_command_tells_what_came_of_it(tmp_path, capsys, monkeypatch) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_requests(source, {"a": "ok", "b": "400", "c": "limited"})
    monkeypatch.setenv("TURBOFIT_API_KEY", "k")
    words = ["batch", str(source), str(output)]
    with StandIn(key="k") as server:
        words += ["--url", server.url.removeprefix("http://")]
        assert main(words) == 0
        told = capsys.readouterr()
        assert not told.out
        assert f"{output}: 2 of 3 items answered, 1 failed; 3 in " in told.err
        assert "requests that the server lowered: 1" in told.err
        assert main([*words, "--json"]) == 0
        told = capsys.readouterr()
        said = json.loads(told.out)
        assert (said["before"], said["answered"], said["failed"]) == (3, 2, 1)
        assert not told.err
        assert main([*words, "--quiet"]) == 0
        assert capsys.readouterr() == ("", "")
        output.unlink()
        assert main([*words, "--api-key", "other"]) == 2
        assert "does not know the key" in capsys.readouterr().err
    assert lines(output) == []


def test_what_is_sent_and_how_it_ends(tmp_path, capsys) -> None:
    source = write_requests(tmp_path / "in.jsonl", {"a": "400"})
    out = str(tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["batch", str(tmp_path / "empty.jsonl"), out + "2", "--url", "http://x"]) == 0
    for words, cause in (
        ([str(source), out], "neither a server nor a model is named"),
        (
            [str(source), out, "--url", "http://x", "--", "--tp", "2"],
            "--tp is an option of a server that batch starts",
        ),
        ([str(source), out, "--model", "m", "--patience", "2"], "leave --patience out"),
        ([str(source), out, "--url", "ftp://x"], "ftp://x is no address"),
        ([str(source), out, "--url", "http://x", "--tp", "2"], "unknown option --tp"),
        ([str(tmp_path), out, "--url", "http://x"], "holds no image"),
    ):
        assert main(["batch", *words]) == 2
        assert cause in capsys.readouterr().err
