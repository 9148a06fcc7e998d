"""turbofit's own environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.process.variables import SERVER_KEYS, keys_in, leases_folder


def test_keys_are_separated_by_commas_and_the_first_variable_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TURBOFIT_API_KEYS", "sk-a, sk-b,,")
    monkeypatch.setenv("TURBOFIT_API_KEY", " ")
    assert keys_in(SERVER_KEYS) == ("sk-a", "sk-b")
    monkeypatch.setenv("TURBOFIT_API_KEY", "sk-c\n")
    assert keys_in(SERVER_KEYS) == ("sk-c",)


@pytest.mark.parametrize("name", ["TURBOFIT_API_KEYS", "TURBOFIT_API_KEY"])
@pytest.mark.parametrize("key", ["geheim geheim", "schlüssel", "se\ncret"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(
    name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, key)
    with pytest.raises(UsageError) as caught:
        keys_in((name,))
    assert caught.value.message.startswith(f"{name}: character ")
    assert key not in f"{caught.value.message}{caught.value.hint}"
    assert key[:2] not in caught.value.message.removeprefix(name)
    monkeypatch.setenv(name, " , ")
    with pytest.raises(UsageError, match=f"{name} has no key"):
        keys_in((name,))


@pytest.mark.parametrize(
    ("value", "what"),
    [("leases", "not an absolute path"), (__file__, "a file"), ("a" * 300, "not an absolute path")],
)
def test_leases_are_a_folder_that_all_turbofits_find(
    value: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path))
    assert leases_folder() == tmp_path
    monkeypatch.setenv("TURBOFIT_LEASES", value)
    with pytest.raises(UsageError, match=f"^TURBOFIT_LEASES '.*{value}' is {what}") as caught:
        leases_folder()
    assert "/tmp/turbofit-leases" in str(caught.value.hint)
