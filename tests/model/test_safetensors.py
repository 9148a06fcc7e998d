"""Headers of safetensors: names, types and shapes; hostile ones are refused."""

from __future__ import annotations

import json

import pytest

from turbofit.core.errors import UsageError
from turbofit.model.safetensors import (
    LARGEST_HEADER,
    Tensor,
    header_length,
    parse_header,
    parse_index,
)


def entry(dtype="F16", shape=(2, 3), offsets=(0, 12)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_names_dtypes_shapes():
    data = json.dumps({
        "__metadata__": {"format": "pt"}, "b": entry(offsets=(4, 16)),
        "a": entry("F32", (), (0, 4)), "none": entry("I64", (0, 5), (4, 4)),
    }).encode()  # fmt: skip
    found = parse_header(data, 8 + len(data) + 16, "x")
    assert found == {
        "a": Tensor("F32", (), 4, "x", 8 + len(data)),
        "b": Tensor("F16", (2, 3), 12, "x", 8 + len(data) + 4),
        "none": Tensor("I64", (0, 5), 0, "x", 8 + len(data) + 4),
    }
    assert found["b"].elements == 6


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"a": entry(offsets=(0, 11))}, None), ({"a": entry(offsets=(12, 0))}, None),
        ({"a": entry(offsets=(-12, 0))}, None), ({"a": entry(offsets=(1, 13))}, None),
        ({"a": entry(), "b": entry(offsets=(0, 12))}, None),
        ({"a": entry(), "b": entry(offsets=(6, 18))}, None),
        ({"a": entry(), "b": entry(offsets=(13, 25))}, None),
        ({"a": entry(dtype="Q9")}, None), ({"a": entry(shape=(-2, -3))}, None),
        ({"a": entry(shape=(1 << 60, 0), offsets=(0, 0))}, None),
        ({"a": entry(shape=(1 << 47, 1 << 47), offsets=(0, 1 << 62))}, None),
        ({"a": entry(shape=[1] * 17, offsets=(0, 2))}, None),
        ({"a": {"dtype": "F16"}}, None), ({"a": {}}, None), ({"a": 5}, None),
        ({"a": entry() | {"shape": "6"}}, None), ({"a": entry() | {"shape": [True, 6]}}, None),
        # Sizes of the file that do not match.
        *(({"a": entry()}, size) for size in (0, 8, 100, 10**12)),
    ],
)  # fmt: skip
def test_hostile_headers(tensors, size):
    with pytest.raises(UsageError):
        parse_header(json.dumps(tensors).encode(), size, "x")


@pytest.mark.parametrize(
    ("prefix", "size"),
    [(b"", 0), (b"1234567", 7), ((0).to_bytes(8, "little"), 8), ((1).to_bytes(8, "little"), 9),
     ((100).to_bytes(8, "little"), 50), ((LARGEST_HEADER + 1).to_bytes(8, "little"), 1 << 60),
     (b"\xff" * 8, None)],
)  # fmt: skip
def test_hostile_lengths(prefix, size):
    with pytest.raises(UsageError):
        header_length(prefix, size, "x")


@pytest.mark.parametrize(
    "index",
    [
        b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "../x.safetensors"}}', b'{"weight_map": {"a": "/x.safetensors"}}',
        b'{"weight_map": {"a": "x.bin"}}', b'{"weight_map": {"a": ".safetensors"}}',
        b'{"weight_map": {"a": "a/b.safetensors"}}',
        b'{"weight_map": {"a": "a\\u0000.safetensors"}}',
    ],
)  # fmt: skip
def test_hostile_indices(index):
    with pytest.raises(UsageError):
        parse_index(index, "index")
