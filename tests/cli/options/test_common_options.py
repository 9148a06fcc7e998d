"""The address of a server that `chat` and `bench` ask."""

from __future__ import annotations

import pytest

from turbofit.cli.main import main
from turbofit.cli.options.common_options import server_of
from turbofit.core.errors import UsageError


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("127.0.0.1", "write it as http://127.0.0.1"),
        ("ftp://host:80", "write it as http://host:80"),
        ("is localhost:80 up", "write it as http://127.0.0.1:23333"),
        ("internvl2-8b", "it is a model"),
    ],
)
def test_what_is_no_address_is_refused(address: str, hint: str) -> None:
    with pytest.raises(UsageError, match="is no address of a server") as caught:
        server_of(address, None)
    assert hint in caught.value.hint
    assert server_of("http://host:80", "k") == ("http://host:80", "k")


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("24400", "127.0.0.1:24400"), ("localhost:24400", "localhost:24400"),
        ("gpu-box.lan:80/v1", "gpu-box.lan:80/v1"), ("[::1]:8000", "[::1]:8000"),
    ],
)  # fmt: skip
def test_a_port_or_a_host_with_its_port_is_an_address(typed: str, address: str) -> None:
    assert server_of(typed, "k") == (f"http://{address}", "k")


@pytest.mark.parametrize(("command", "told"), [("chat", True), ("bench", False)])
def test_only_chat_says_that_it_asks_for_the_message(command: str, told: bool, capsys) -> None:
    assert main([command, "hello world"]) == 2
    said = capsys.readouterr().err
    assert "hello world is no address of a server" in said
    assert ("chat asks for the message" in said, "write it as http://" in said) == (told, not told)


def test_a_server_that_does_not_answer_is_said(capsys) -> None:
    assert main(["chat", "http://127.0.0.1:9"]) == 3
    assert 'says "ready at" when it answers' in capsys.readouterr().err
