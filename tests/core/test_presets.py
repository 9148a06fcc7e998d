"""Files of presets: damaged ones are refused, and mappings are merged level by level."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, merged


@pytest.mark.parametrize(
    ("text", "said"),
    [("- 1", "x.yaml is not a mapping"), ("a: [", "x.yaml cannot be read"), ("[" * 9999, "read")],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_yaml(path)
    below = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert merged(below, {"a": {"c": [2]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 1},
    }
