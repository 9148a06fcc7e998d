"""Two servers on one pretend card behind one address: LMDeploy's real servers, real memory."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.processes import free_port
from tests.support.serving import ask_at, needs, serve_pretend, start_turbofit
from tests.support.waiting import until

#: Before a release: shares, names and restarts are held each by itself in each check.
pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]
needs("lmdeploy", "fastapi", "torchvision")


def test_two_share_a_card_behind_one_address(children, tmp_path, internvl2, qwen2_vl) -> None:
    models = {"first": internvl2, "second": qwen2_vl}
    servers = {}
    for name, folder in models.items():
        servers[name] = serve_pretend(
            children, tmp_path, str(folder), "--on", "1xrtx3060", "--budget", "45%",
            "--context", "4096", "--check", "none", "--model-name", name, TMPDIR=str(tmp_path),
        )  # fmt: skip
        servers[name].wait()
    runs = sorted((tmp_path / "turbofit" / "runs").glob("*/plan.json"))
    plans = {plan["model"]["name"]: plan for plan in map(json.loads, (p.read_text() for p in runs))}
    first, second = (plans[folder.name]["engines"][0]["ledgers"][0] for folder in models.values())
    assert (first["used"], second["used"] > first["peak"]) == (0, True)
    assert second["peak"] + second["margin"] - second["withheld"] <= second["total"]
    for served in servers.values():
        tokens = re.search(r"KV tokens: ([\d,]*\d) \(forecast ([\d,]*\d)", served.child.stderr)
        assert tokens is not None
        assert tokens[1] == tokens[2]

    port = free_port()
    urls = [f"{name}={served.url}" for name, served in servers.items()]
    gateway = start_turbofit(children, tmp_path, "gateway", "--port", str(port), "--models", *urls)
    assert gateway.process.stdout is not None
    url = gateway.process.stdout.readline().strip()
    assert url.endswith(f":{port}")
    until(lambda: ask_at(url, "/health")[2]["up"] == 2, "both servers to be up")
    listed = ask_at(url, "/v1/models")[2]["data"]
    assert [card["id"] for card in listed] == list(models)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for name in models:
        status, headers, answer = ask_at(url, "/v1/chat/completions", {**body, "model": name})
        assert (status, answer["model"]) == (200, name)
        assert "x-turbofit-pretend" in headers
    status, _, answer = ask_at(url, "/v1/chat/completions", {**body, "model": "third"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "there are first, second" in answer["error"]["message"]
