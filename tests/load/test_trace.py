from __future__ import annotations

import csv

import pytest

from turbofit.core.errors import UsageError
from turbofit.load.trace import read_trace


def written(tmp_path, text: str, name: str = "trace.jsonl") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_requests_are_in_order_and_begin_at_zero(tmp_path) -> None:
    path = written(
        tmp_path,
        '{"at": 12.5, "output_tokens": 7, "prompt_bytes": 400}\n\n'
        '{"at": 10, "output_tokens": 3, "prompt_tokens": 9, "images": [[640, 480]]}\n',
    )
    first, second = read_trace(path)
    assert (first.at, first.text_tokens, first.images) == (0, 9, ((640, 480),))
    assert (second.at, second.text_tokens, second.output_tokens) == (2.5, 100, 7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no request"),
        ("x\n", "line 1 of"),
        ('{"at": 0, "output_tokens": 1}\n{"at": -1, "output_tokens": 1}\n', "line 2 of"),
        ('{"at": 0}\n', "output_tokens"),
        ('{"at": 0, "output_tokens": 1, "images": [[0, 5]]}\n', "images"),
        (f'{{"at": 0, "output_tokens": 1, "images": {[[1, 1]] * 1025}}}\n', "1025"),
        ('{"at": NaN, "output_tokens": 1}\n', "line 1"),
    ],
)
def test_a_bad_trace_is_refused_by_its_line(tmp_path, text, says) -> None:
    with pytest.raises(UsageError, match=says):
        read_trace(written(tmp_path, text))


def test_a_table_of_arrivals_is_a_trace(tmp_path) -> None:
    text = (
        "arrival,text_tokens,images,answer_tokens\n"
        "0.5, 20, 640x480 1024x768, 7\n"
        "2,300,,9\n"
        "3.5,1,2,1\n"
    )
    first, second, third = read_trace(written(tmp_path, text, "trace.csv"))
    assert (first.at, first.text_tokens, first.output_tokens) == (0, 20, 7)
    assert first.images == ((640, 480), (1024, 768))
    assert (second.at, second.images) == (1.5, ())
    assert third.images == ((1920, 1080),) * 2


@pytest.mark.parametrize(
    "row", ["1", "1,2,3", "a,1,,1", "1,1,9999,1", "1,1,x,1", "1,,,1", ",,,", "-1,1,,1"]
)
def test_a_wrong_row_is_named(tmp_path, row: str) -> None:
    with pytest.raises(UsageError, match="2 of") as caught:
        read_trace(written(tmp_path, f"0,1,,1\n{row}\n", "trace.csv"))
    assert "write arrival" in caught.value.hint or "1024" in caught.value.hint


def test_a_cell_that_no_csv_has_is_refused(tmp_path) -> None:
    path = written(tmp_path, f"0,1,,1\n{'1' * 140_000},1,,1\n", "trace.csv")
    before = csv.field_size_limit(131_072)  # Python's own, which other readers raise
    try:
        with pytest.raises(UsageError, match="no CSV of requests") as caught:
            read_trace(path)
    finally:
        csv.field_size_limit(before)
    assert "write arrival" in caught.value.hint
