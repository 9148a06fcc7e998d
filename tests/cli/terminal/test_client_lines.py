from __future__ import annotations

import ast
import json
import shlex

from turbofit.cli.terminal.client_lines import client_lines


def test_the_shell_line_is_one_request() -> None:
    shell, _ = client_lines("http://127.0.0.1:1", "o'b/m", key=False)
    curl, url, _, header, _, body = shlex.split(shell)
    assert (curl, url) == ("curl", "http://127.0.0.1:1/v1/chat/completions")
    assert header == "Content-Type: application/json"
    assert json.loads(body)["model"] == "o'b/m"


def test_the_python_line_parses_and_a_key_is_read_from_the_environment() -> None:
    shell, python = client_lines("http://h:1", "m", key=True)
    call = ast.parse(python, mode="eval")
    assert "http://h:1/v1" in ast.dump(call)
    assert "API_KEY" in ast.dump(call)
    assert "Bearer $API_KEY" in shell
