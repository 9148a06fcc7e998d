"""`turbofit gateway --cluster`: a front of one run."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

from turbofit.cli.main import main
from turbofit.gateway import server
from turbofit.serving.cluster import actors, ray_adapter


def test_a_front_stays_with_the_run_that_it_began_with(monkeypatch, capsys) -> None:
    runs, fronts = ["first"], []
    monkeypatch.setattr(ray_adapter, "connected", lambda _: nullcontext())
    monkeypatch.setattr(actors, "statuses", lambda _: [SimpleNamespace(serves=one) for one in runs])
    monkeypatch.setattr(actors, "address_source", lambda run: lambda: [run])
    monkeypatch.setattr(server, "run_gateway", lambda front, on_ready: fronts.append(front))
    assert main(["gateway", "--cluster", "ray", "--port", "0"]) == 0
    runs.append("second")
    assert fronts[0]._source() == ["first"]
    assert main(["gateway", "--cluster", "ray", "--port", "0"]) == 2
    assert (
        "2 models are served there\nhint: choose one with --name: first, second"
        in capsys.readouterr().err
    )
