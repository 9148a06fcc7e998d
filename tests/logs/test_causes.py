"""`presets/causes.yaml`: what a row takes for its message, and what it computes from the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.logs.conftest import explain, message, some
from turbofit.logs import rules
from turbofit.logs.answer import Diagnosis
from turbofit.logs.case import LogCase
from turbofit.logs.causes import Hit, Row, table
from turbofit.logs.facts import LogEvent, read_runs
from turbofit.logs.log_reader import log_lines
from turbofit.logs.subject import _FACTS


@pytest.mark.parametrize(
    "line",
    [
        "2026-03-01 10:00:01 - lmdeploy - INFO - input backend=pytorch, backend_config="
        "PytorchEngineConfig(dtype='auto', tp=1, session_len=None, trust_remote_code=False, x=1)",
        "Launching model qwen2 with following model config: {'model_path': '/m', 'tp': 2,"
        " 'trust_remote_code': True, 'device': 'cuda'}",
        "args: Namespace(model='a', tp=2, trust_remote_code=True, port=8000)",
        "The argument `trust_remote_code` is to be used with Auto classes. It has no effect here",
    ],
)
def test_a_dump_of_settings_is_no_message(line: str) -> None:
    assert explain(line).kind == "unknown"
    assert explain(f"{line}\nINFO:     Application startup complete.\n").kind == "healthy"
    died = explain(f"{line}\nRuntimeError: CUDA error: invalid device ordinal\n")
    assert (died.kind, died.also) == ("no_such_gpu", ())


#: Words of a guess: a row that needs them lists its causes in `possible`.
GUESSED = re.compile(r"most often|most likely|\beither \w|usually|probably|perhaps|\bmay be\b")
#: What Python, torch, CUDA and NCCL say of every program says what failed, not why.
OF_ALL = re.compile(
    r"object has no attribute|(?<!\(\?!)cannot import name|unexpected keyword argument"
    r"|device-side assert|illegal memory access|CUBLAS_STATUS|CUDNN_STATUS|unhandled system error"
    r"|contains either|mat1 and mat2 shapes|not enough\|too many"
)


def texts_of(row: Row) -> list[str]:
    """All sentences of a row, both forms of a pair."""
    pairs = (row.what, *row.why, *row.possible, *row.change, *row.unknown)
    return [text for pair in pairs for text in ((pair,) if isinstance(pair, str) else pair)]


def test_a_row_proves_a_cause_or_lists_what_others_had() -> None:
    for row in table().rows:
        assert bool(row.what) != bool(row.possible), row
        assert not row.possible or (row.change and not row.why and not row.unknown)
        proof = [
            text
            for pair in (row.what, *row.why)
            for text in ([pair] if isinstance(pair, str) else pair)
        ]
        assert not GUESSED.search(" ".join(proof)), row.what
        # A name of Transformers is in its wheels, or is not.
        assert row.possible or row.when or not OF_ALL.search(row.pattern), row.pattern


#: Logs of rows, most of which were learned from public reports, with made-up details.
EXAMPLES: list[tuple[str, str]] = yaml.load(
    (Path(__file__).parent / "rules" / "examples.yaml").read_bytes(), yaml.CSafeLoader
)


def test_what_a_server_refuses_goes_before_that_it_is_up() -> None:
    up = "INFO:     Application startup complete.\n"
    refused = "ERROR message='The model `/m/llava` does not exist.' type='NotFoundError' code=404\n"
    assert explain(up + refused).kind == "wrong_model_name"


class Aloud(NamedTuple):
    """The answers to all examples, and what each row said in them, by its place."""

    answers: dict[str, Diagnosis]
    told: dict[int, set[str]]


@pytest.fixture(scope="module")
def aloud() -> Aloud:
    answers, told = dict[str, Diagnosis](), dict[int, set[str]]()
    places = {id(row): place for place, row in enumerate(table().rows)}
    sentence, figures_of = rules.sentence, rules.figures_of
    asked: list[Row] = []

    def known(case: LogCase, mark: LogEvent, hit: Hit) -> dict[str, Any]:
        asked.append(hit.row)
        return figures_of(case, mark, hit)

    def heard(text: Any, figures: Any) -> str:
        said = sentence(text, figures)
        told.setdefault(places[id(asked[-1])], set()).add(said)
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "sentence", heard)
        patch.setattr(rules, "figures_of", known)
        for _, log in EXAMPLES:
            answers[log] = explain(f"INFO: a GPU server starts\n{log}\n")
    return Aloud(answers, told)


def test_kinds_that_people_report(aloud: Aloud) -> None:
    found = [(log, kind, message(aloud.answers[log])) for kind, log in EXAMPLES]
    assert [(log, kind, said) for log, kind, said in found if said != kind] == []


def test_each_row_is_read_aloud(aloud: Aloud) -> None:
    """Each row answers an example with whole sentences: no figure of one is missing."""
    assert [row.says for place, row in enumerate(table().rows) if place not in aloud.told] == []
    assert [said for sentences in aloud.told.values() for said in sentences if "?" in said] == []


REFUSED = (
    'Traceback (most recent call last):\n  File "/v/lmdeploy/config.py", line 1, in f\n'
    "ValueError: this quantization is not supported"
)


@pytest.mark.parametrize("before", [False, True])
def test_a_cause_goes_before_what_a_check_says_by_its_form(before: bool) -> None:
    cause = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    lines = (REFUSED, cause) if before else (cause, REFUSED)
    assert (explain(REFUSED).kind, explain("\n".join(lines)).kind) == ("unknown", "out_of_memory")


def test_an_unknown_error_after_a_check_goes_before_it() -> None:
    found = explain(f"{REFUSED}\nZeroDivisionError: division by zero\n")
    assert found.kind == "unknown"
    assert "ZeroDivisionError" in found.what


def test_a_command_that_stands_in_the_log_is_not_asked_for() -> None:
    line = "[TM][ERROR]  Assertion fail: /w/src/turbomind/python/bind.cpp:9"
    assert any("command that was run" in one for one in explain(line).send)
    given = explain(f"$ lmdeploy serve api_server /m\n{line}\n")
    assert not any("command that was run" in one for one in given.send)


def test_every_text_that_the_code_asks_for_exists_and_is_asked_for() -> None:
    code = "".join(path.read_text() for path in Path(rules.__file__).parent.glob("*.py"))
    names = set(table().texts)
    assert set(re.findall(r"""text_of\(["']([\w -]+)["']\)""", code)) <= names
    assert not [name for name in names if not re.search(rf"""["']{name}["']""", code)]


def test_rows_use_figures_and_groups_that_exist() -> None:
    """A group that a way through the pattern leaves out stands in the first form of a pair only."""
    run = read_runs(log_lines([b"x"]))[0]
    case, mark = LogCase(run, model=None, on=None), LogEvent(1, "x")
    known = set(rules.figures_of(case, mark, Hit(table().rows[0], {}, "x")))
    facts = set(_FACTS.groupindex)
    for row in table().rows:
        groups = set(re.compile(row.pattern).groupindex)
        assert not (groups & known) - {"arch", "said"}, row.what
        for text in (*texts_of(row), f"{{{row.when}}}" if row.when else ""):
            sizes = {group.removesuffix("_bytes") for group in groups if group.endswith("_bytes")}
            assert rules.names_of(text) <= {*groups, *sizes, *known, *facts, "communicator"}, text


RAISED = '  File "/v/site-packages/{}", line 9, in {}\n    {}\n'


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("no_kernel_image",
         "RuntimeError: [TM][ERROR] CUDA runtime error: invalid device function /w/a.cu:9"),
        ("check_failed", "[TM][ERROR]  Assertion fail: /w/src/turbomind/python/bind.cpp:9"),
        ("nccl_error", "h:9:9 [0] transport/net_ib.cc:9 NCCL WARN NET/IB : Got completion with"
         " error 12, opcode 0"),
        ("wrong_dtype", "AssertionError: Input and cos/sin must have the same dtype, got torch"),
        ("no_gpu", "ImportError: libcuda.so.1: cannot open shared object file: No such file"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_message_that_several_causes_share_is_unknown_with_a_list(kind: str, line: str) -> None:
    found = explain(f"$ lmdeploy serve api_server /m/a\n{line}\n")
    assert (found.kind, found.phase, found.changes) == ("unknown", "unknown", ())
    assert not found.known
    assert found.what.endswith(line.strip())
    assert some(found.others).message == kind
    assert len(some(found.others).had) > 1
    assert some(found.others).tried
    assert found.send
    assert found.unknown[0] == "what caused it"


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("gpu_too_old", "ValueError: type fp8e4nv not supported in this architecture."),
    ],
)  # fmt: skip
def test_a_message_that_tells_its_cause_has_no_list(kind: str, line: str) -> None:
    found = explain(f"$ lmdeploy serve api_server /m/a\n{line}\n")
    assert (found.kind, found.others) == (kind, None)
