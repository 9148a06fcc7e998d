"""`bench/golden`: its cases cover the command line; what differs is seen; a part is made again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.golden import __main__ as program
from bench.golden.cases import Case, all_cases
from bench.golden.figures import figures_of, moved
from bench.golden.kept import keep, read_figures, read_sentences
from bench.golden.render import Workplace, workplace
from bench.golden.words import reworded, sentences_of, where

pytestmark = pytest.mark.slow

CASES = all_cases()
#: Groups whose documents need nothing but turbofit, and list no presets. The first of each, which
#: people chose, and one in so many of the others are made again.
_MADE_AGAIN = {
    "machine": 4, "report": 4, "export": 4, "diagnose": 4, "cluster": 12, "refused": 12,
    "plan": 240, "predict": 240,
}  # fmt: skip
_FIRST = 4
#: Commands whose refusals rest on what is installed or running here.
_REST_ON_HERE = ("rehearse", "serve", "gateway", "calibrate", "cluster", "merge")
#: Command lines of short answers: their only option names the machines.
_SHORT = re.compile(r"(plan|machine)( (?!--)\S+)*( --(on|cluster) \S+)?")


@pytest.fixture(scope="module")
def place() -> Iterator[Workplace]:
    with workplace() as found:
        yield found


def test_a_document_for_each_kind_of_answer():
    assert len({case.name for case in CASES}) == len(CASES)
    made = [case for case in CASES if case.group in ("plan", "predict", "cluster")]
    assert len(made) >= 300
    for command in ("plan", "predict"):
        forms = [case.line for case in made if case.line.startswith(command)]
        assert all(any(form in line for line in forms) for form in (" --json", " --md"))
        assert any("--json" not in line and "--md" not in line for line in forms)
    kept = read_figures(dict.fromkeys(case.group for case in CASES))
    assert set(kept) == {case.name for case in CASES}, "run python -m bench.golden --renew"


@pytest.mark.parametrize("command", ["plan", "predict"])
def test_every_option_is_in_a_case(command, place):
    page = place.answer([command, "--help"]).out
    listed = set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", page, re.MULTILINE))
    assert {"--tp", "--images", "--json", "--eager-mode"} <= listed
    lines = [case.line.split(" -- ")[0].split() for case in CASES]
    given = {word for words in lines if words[:1] == [command] for word in words[1:]}
    assert listed - given <= {"--help", "--verbose"}  # which change no answer


def test_every_command_has_its_help_page(place):
    commands = re.findall(r"^  ([a-z]+)  +\S", place.answer(["--help"]).out, re.MULTILINE)
    assert {"plan", "serve", "cluster"} <= set(commands)
    pages = {case.line for case in CASES if case.group == "help"}
    assert {f"{command} --help" for command in commands} <= pages


@pytest.fixture(scope="module")
def again():
    """Cases that are made again, with their documents by name."""
    found = []
    for group, every in _MADE_AGAIN.items():
        cases = [case for case in CASES if case.group == group]
        found += cases[:_FIRST] + cases[_FIRST::every]
    return [case for case in found if not case.line.startswith(_REST_ON_HERE)]


@pytest.fixture(scope="module")
def documents(place, again):
    return {case.name: place.document(case) for case in again}


def test_a_part_of_the_documents_is_as_it_was(again, documents):
    assert len(documents) > 70
    lines = program.since_renewal(again, documents, whole=False)
    assert lines == [], "\n".join(lines)
    assert not any('"kind": "bug"' in text for text in documents.values())


@pytest.fixture
def renewed(again, documents, tmp_path, monkeypatch) -> None:
    """What is kept is as these documents are."""
    keep(again, documents, tmp_path)
    monkeypatch.setattr(program, "read_figures", partial(read_figures, folder=tmp_path))
    monkeypatch.setattr(program, "read_sentences", partial(read_sentences, tmp_path))


@pytest.mark.usefixtures("renewed")
def test_a_changed_figure_is_named_with_what_it_was(again, documents):
    line = "plan internvl2-8b --on 4xrtx3090 --tp 4 --json"
    assert "274 MiB" in documents[line]
    now = documents[line].replace('"dtype": "bfloat16"', '"dtype": "float16"')
    lines = program.since_renewal(again, {line: now.replace("274 MiB", "9 MiB")}, whole=False)
    assert lines[:2] == [f"\n{line}", "  changed model.dtype: bfloat16 -> float16"]
    assert [one for one in lines if one.startswith("  said")] == [
        "  said in “memory, no peer access): # requests at once; # stay free on each”: "
        "274 MiB -> 9 MiB"
    ]
    assert not [one for one in lines if one.startswith("changed in")]


@pytest.mark.usefixtures("renewed")
def test_a_changed_sentence_is_one_line_however_many_documents_have_it(again, documents):
    now = {name: text.replace("best rank of", "first rank of") for name, text in documents.items()}
    changed = sum(now[name] != documents[name] for name in now)
    assert changed > 2
    sentences = {
        one for text in now.values() for one in sentences_of(text) if "first rank of" in one
    }
    line, hint = program.since_renewal(again, now, whole=False)
    said = f"{len(sentences)} sentences, {changed} documents: best -> first, as in “"
    assert said in line
    assert hint.startswith("--against COMMIT")
    assert program.since_renewal(again, now, whole=False, words=False) == []


def test_what_is_kept_is_read_again(again, documents, tmp_path):
    keep(again, documents, tmp_path)
    assert sum(read_sentences(tmp_path).values()) > len(documents)
    figures = read_figures(_MADE_AGAIN, tmp_path)
    for case in again:
        assert moved(figures[case.name], figures_of(documents[case.name])) == []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("figures/*.xz")}
    keep(again, documents, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_sentences_are_lines_that_are_joined_again_without_figures():
    full = "warning: the cache holds 3,840 tokens, which is less than one of the requests takes, at"
    wrapped = f"{full}\n  tp 2 on w4a16\n| table | 7 MiB |\n- hint: send 2 images\n[{'W' * 60}]\n7"
    json_too = document({"a": "the cache holds 7 tokens", "dtype": "float16"})
    assert sentences_of(document(wrapped)) == {
        "the cache holds #, which is less than one of the requests takes, at tp # on #",
        "| table | # |",
        "send # images",
    }
    assert sentences_of(json_too) == {"the cache holds #"}


def test_sentences_that_are_gone_new_or_elsewhere_are_told():
    before = {"one of # GPUs is held": 2, "the cache is full": 3, "a b c d": 1}
    now = {"one of # GPUs is free": {"x", "y"}, "the cache is full": {"x"}, "e f g h": {"x"}}
    assert list(reworded(before, now, whole=True)) == [
        "changed in 1 sentence, 2 documents: held -> free, as in “one of # GPUs is free”",
        "new in 1 document: e f g h",
        "gone from 1 document: a b c d",
        "in 2 documents fewer: the cache is full",
    ]
    assert len(list(reworded(before, now, whole=False))) == 2
    assert list(where({"x": document("all is well"), "y": document("all is well")}).items()) == [
        ("all is well", {"x", "y"})
    ]


def test_a_short_answer_fits_a_terminal(documents):
    short = [name for name in documents if _SHORT.fullmatch(name)]
    assert {name.split()[0] for name in short} == {"plan", "machine"}
    for name in short:
        answer = documents[name].split("--- stdout\n")[1].partition("--- stderr\n")[0].splitlines()
        assert len(answer) <= 27, name  # two sizes have two times to a first token
        assert all(len(line) <= 80 or is_one_option(line) for line in answer), name


def is_one_option(line: str) -> bool:
    """Whether it is an option and its value, one word of a shell, which no line can break."""
    option, *values = shlex.split(line.removesuffix("\\"))
    return option.startswith("--") and len(values) == 1


def test_the_environment_of_the_caller_is_kept_out(place, monkeypatch):
    line = "plan internvl2-8b --on 4xrtx3090 --tp 2 --json"
    alone = place.document(Case("plan", line))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("HF_HOME", "hf")
    assert place.document(Case("plan", line)) == alone
    assert "WORLD_SIZE=2" in place.document(Case("plan", line, env=(("WORLD_SIZE", "2"),)))


def document(out: object, err: str = "", code: int = 0) -> str:
    said = out if isinstance(out, str) else json.dumps(out)
    return f"$ plan\nexit code: {code}\n--- stdout\n{said}\n--- stderr\n{err}"


def told(before: str, now: str) -> list[str]:
    return [str(figure) for figure in moved(figures_of(before), figures_of(now))]


def test_words_may_change_and_figures_may_not():
    plan = {"note": "holds 3,840 tokens or so", "bytes": 1, "dtype": "float16", "moe": None}
    one = document(plan, "warning: 258 MiB stay free, and --tp 2 is set")
    said = document({**plan, "note": "3,840 tokens, it holds"}, "--tp 2 leaves 258\n MiB")
    assert told(one, said) == []
    assert told(one, document({**plan, "bytes": 2, "dtype": "bfloat16", "moe": 1})) == [
        "changed bytes: 1 -> 2",
        "changed dtype: float16 -> bfloat16",
        "changed moe: null -> 1",
        "said in words: 258 MiB; --tp 2 -> (none)",
    ]
    assert told(one, one.replace("code: 0", "code: 3")) == ["changed exit code: 0 -> 3"]


def test_new_keys_are_no_changed_figures():
    def plan(*terms: tuple[str, int], **more: int) -> str:
        ledger = [{"bytes": size, "term": name, "note": "a b"} for name, size in terms]
        return document({"gpus": [{"index": 0, "ledger": ledger}], "argv": ["--tp", "2"], **more})

    before = plan(("weights", 7), ("cache", 7))
    assert told(before, plan(("context", 1), ("weights", 7), ("cache", 8), new=3)) == [
        "changed gpus[0].ledger[cache].bytes: 7 -> 8",
        'added gpus[0].ledger[context]: {"bytes": 1, "term": "context", "note": "…"}',
        "added new: 3",
    ]
    assert told(plan(new=3), plan()) == ["gone new: 3"]
    assert told(plan(), plan().replace('"2"', '"4", "--async"')) == ["changed argv: 2 -> 4 --async"]
    assert told(document({"a": [1, 2]}), document({"a": [2, 1]})) == ["changed a: 1 2 -> 2 1"]


def test_the_program_imports_no_turbofit_before_a_version_is_chosen() -> None:
    """`--against COMMIT` runs this program with the other commit's turbofit."""
    code = "import bench.golden.__main__, sys; sys.exit('turbofit' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_a_difference_ends_with_1(tmp_path, monkeypatch, capsys):
    cases = all_cases(["presets"])
    documents = {case.name: f"$ {case.name}\n--- stdout\n" for case in cases}
    monkeypatch.setattr(program, "made", lambda _: documents)
    argv = ["--only", "presets", "--against", str(tmp_path)]
    assert program.main(argv) == 2
    assert program.main(["--only", "presets", "--write", str(tmp_path)]) == 0
    assert program.main(argv) == 0
    assert "6 documents compared, 0 differ" in capsys.readouterr().out
    documents["models"] += "more\n"
    assert program.main(argv) == 1
    said = capsys.readouterr().out
    assert "\n+more\n" in said
    assert "6 documents compared, 1 differ" in said
    assert program.main(["--only", "presets"]) == 1
    assert "\ngpus --json\n  changed exit code" in capsys.readouterr().out
    assert program.main(["--only", "presets", "--renew"]) == 2
    assert program.main([*argv, "--figures"]) == 0
    documents["models"] = documents["models"].replace("more", "7 GiB")
    assert program.main([*argv, "--figures"]) == 1
    said = capsys.readouterr().out
    assert "\nmodels\n  said in words: (none) -> 7 GiB\n" in said
    assert said.endswith("differ, 0 have new keys alone; 0 are new, 0 gone\n")
