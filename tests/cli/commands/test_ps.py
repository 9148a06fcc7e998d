"""`turbofit cluster status`: the answer of the nodes alone stands in stdout."""

from __future__ import annotations

import json
import sys
import threading
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

from turbofit.cli.main import main
from turbofit.cli.terminal.output import answer
from turbofit.core.cluster import NodeStatus
from turbofit.serving.cluster import ray_adapter


def test_what_ray_prints_does_not_stand_in_the_answer(capsys, monkeypatch) -> None:
    """Ray's listener prints errors to stdout at any time, though no log goes to the driver."""

    def tell(**_: object) -> None:
        listener = threading.Thread(target=print, args=("(raylet) The node is dead",))
        listener.start()
        listener.join()

    status = NodeStatus(
        serves="m", id="a1", name="n", address="10.0.0.1", cards="", state="serving"
    )
    actor = SimpleNamespace(get_status=SimpleNamespace(remote=tell))
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    ray = SimpleNamespace(
        __spec__=ModuleSpec("ray", None), init=tell, shutdown=tell,
        get=lambda ref, timeout: status, get_actor=lambda name: actor,
        get_runtime_context=lambda: context,
        util=SimpleNamespace(list_named_actors=lambda: ["m/a1/0"]),
        exceptions=SimpleNamespace(AuthenticationError=OSError, RayError=OSError),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert main(["cluster", "status", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [one["name"] for one in json.loads(out)] == ["n"]
    assert err.count("(raylet)") == 3
    with ray_adapter.connected(None):
        answer("http://127.0.0.1:8000\n")
    assert capsys.readouterr().out == "http://127.0.0.1:8000\n"
