"""turbofit's own environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.process.variables import EnvironmentVariables, variables


def test_what_is_blank_or_not_turbofits_is_not_given() -> None:
    blank = {"TURBOFIT_API_KEYS": " ", "TURBOFIT_LEASES": ""}
    others = ("TURBOFIT_ENGINE_KEY", "TURBOFIT_PRETEND_MACHINE", "TURBO_API_KYES")
    assert variables({**blank, **dict.fromkeys(others, "x y")}) == EnvironmentVariables()


def test_values(tmp_path: Path) -> None:
    given = {"API_KEYS": "sk-a, sk-b,,", "API_KEY": "sk-c\n", "UPSTREAM_KEY": "d",
             "LEASES": str(tmp_path), "NODE_SPEC": "2xrtx3090"}  # fmt: skip
    read = variables({f"TURBOFIT_{name}": value for name, value in given.items()})
    assert (read.api_keys, read.api_key, read.upstream_key) == (("sk-a", "sk-b"), "sk-c", "d")
    assert (read.leases, read.node_spec) == (tmp_path, "2xrtx3090")


@pytest.mark.parametrize("name", ["TURBOFIT_API_KEYS", "TURBOFIT_API_KEY", "TURBOFIT_UPSTREAM_KEY"])
@pytest.mark.parametrize("key", ["geheim geheim", "schlüssel", "se\ncret"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(name: str, key: str) -> None:
    with pytest.raises(UsageError) as caught:
        variables({name: key})
    assert caught.value.message.startswith(f"{name}: character ")
    assert key not in f"{caught.value.message}{caught.value.hint}"
    assert key[:2] not in caught.value.message.removeprefix(name)


@pytest.mark.parametrize(
    ("value", "what"),
    [("leases", "not an absolute path"), (__file__, "a file"), ("a" * 300, "not an absolute path")],
)
def test_leases_are_a_folder_that_all_turbofits_find(value: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"^TURBOFIT_LEASES '.*{value}' is {what}") as caught:
        variables({"TURBOFIT_LEASES": value})
    assert "/tmp/turbofit-leases" in str(caught.value.hint)
