"""The fuzzing bench: what is kept ends as it may, and what does not is noticed."""

from __future__ import annotations

import re
from base64 import b64encode
from contextlib import suppress

import pytest

from bench.fuzz import corpus
from bench.fuzz.check import check
from bench.fuzz.minimise import minimised
from bench.fuzz.mutate import bent
from bench.fuzz.targets import TARGETS, load
from turbofit.core.errors import UsageError
from turbofit.core.units import parse_bytes

#: Pillow's, of broken images: the gateway hides them, pytest shows them all the same.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")
#: Bytes of all files that are kept.
MOST = 300_000
#: Beside eight busy loops a call is interrupted, but its own processor time stays.
SECONDS = 2.0


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_kept_ends_as_it_may(name) -> None:
    target = load(name)
    kept = [*map(corpus.Kept, target.seeds()), *corpus.inputs(name)]
    assert len(kept) > 5
    for one in kept:
        finding = check(target.one, one.data, SECONDS)
        assert finding is None, (one.note, b64encode(one.data), finding.text)


def test_the_corpus_is_small_and_has_no_other_file() -> None:
    files = list(corpus.FOLDER.iterdir())
    assert {path.name for path in files} <= {f"{name}.txt" for name in TARGETS}
    assert sum(path.stat().st_size for path in files) < MOST


def test_the_corpus_survives_its_file(tmp_path) -> None:
    kept = [corpus.Kept(b"\0\n#", "it broke"), corpus.Kept(b""), corpus.Kept(b"a")]
    corpus.write(tmp_path / "one.txt", [*kept, kept[2]])
    assert corpus.read(tmp_path / "one.txt") == kept
    assert corpus.read(tmp_path / "none.txt") == []


def test_an_end_that_is_not_promised_is_named_by_its_place() -> None:
    def one(data: bytes) -> None:
        parse_bytes(data.decode(), what="a size")

    finding = check(one, b"x")
    assert finding is not None
    assert re.fullmatch(r"UsageError-turbofit-core-units-\d+", finding.name)
    assert UsageError.__name__ in finding.text
    assert check(one, b"1GiB") is None


def test_what_takes_too_long_is_ended() -> None:
    def one(data: bytes) -> None:
        while True:
            len(data)

    finding = check(one, b"", 0.05)
    assert finding is not None
    assert finding.name == "TooSlow-tests-bench-test_fuzz-one"


def test_the_shortest_inputs_that_reach_all_lines_are_kept() -> None:
    def one(data: bytes) -> None:
        with suppress(UsageError):
            parse_bytes(data.decode(), what="a size")

    data = [b"1GiB", b"1GiB ", b"12GiB", b"no size", b"none at all"]
    assert minimised(one, [], data) == [b"1GiB", b"no size"]
    assert minimised(one, [b"1GiB"], data) == [b"no size"]


def test_json_inside_an_input_is_bent_the_same_for_the_same_seed() -> None:
    data = b'\x02{"a": [1, {"b": "c"}]}|~|'
    made = {bent(data, seed) for seed in range(60)}
    assert len(made) > 20
    assert all(one is not None and one[:1] == b"\x02" and one.endswith(b"|~|") for one in made)
    assert bent(data, 7) == bent(data, 7)
    assert bent(b"no JSON", 1) is None
    assert bent(b"[" * 3000 + b"]" * 3000, 1) is None
