from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from tests.load.scripted import ThreadedServer
from turbofit.core.errors import UsageError
from turbofit.gateway.http.metrics import Metrics, merge
from turbofit.observe.live import fetch_page, now_of, parse_page

ENGINES = {
    0: 'lmdeploy:num_requests_running{model_name="m"} 2\n'
    'lmdeploy:num_requests_waiting{model_name="m"} 1\n'
    'lmdeploy:gpu_cache_usage_perc{model_name="m"} 0.25\n'
    'lmdeploy:prompt_tokens_total{model_name="m"} 5000\n'
    'lmdeploy:generation_tokens_total{model_name="m"} 300\n',
    1: "",
}


def page() -> str:
    """What the gateway itself writes."""
    metrics = Metrics()
    metrics.count("requests_total", "route=chat", "status=200", by=9)
    metrics.count("limited_total", "what=max_dynamic_patch", by=4)
    metrics.count("refused_total", "reason=images", by=2)
    metrics.count("engine_failures_total", "engine=1")
    labels = [("engine=0",), ("engine=1",)]
    gauges = {
        "waiting": [((), 3.0)],
        "in_flight": [(labels[0], 2.0), (labels[1], 0.0)],
        "units_in_flight": [(labels[0], 26.0), (labels[1], 0.0)],
        "engine_up": [(labels[0], 1.0), (labels[1], 0.0)],
    }
    return merge(ENGINES) + metrics.text(gauges)


class Gateway(ThreadedServer):
    gets = "/metrics"

    async def page(self, _: web.Request) -> web.Response:
        return web.Response(text=page())


@pytest.fixture
def server() -> Iterator[str]:
    with Gateway(key="right") as running:
        yield running.url


def test_what_the_gateway_says() -> None:
    now = now_of(page())
    assert (now.waiting, now.requests, now.failures) == (3, 9, 1)
    assert now.limited == {"max_dynamic_patch": 4}
    assert now.refused == {"images": 2}
    first, second = now.engines
    assert (first.up, first.in_flight, first.units, first.running, first.queued) == (
        True, 2, 26, 2, 1,
    )  # fmt: skip
    assert (first.cache_used, first.prompt_tokens, first.generated_tokens) == (0.25, 5000, 300)
    assert (second.up, second.running, second.generated_tokens) == (False, None, None)


def test_engines_of_a_cluster_have_names() -> None:
    ours = "turbofit_gateway_"
    lines = [f"{ours}waiting 0"]
    for label, up in (("10", 1), ("2", 1), ("n1-b", 0), ("n1-a", 1)):
        lines.append(f'{ours}engine_up{{engine="{label}"}} {up}')
    found = now_of("\n".join(lines) + "\n").engines
    assert [(one.index, one.up) for one in found] == [
        (2, True), (10, True), ("n1-a", True), ("n1-b", False),
    ]  # fmt: skip


def test_of_several_models_each_has_its_own_numbers() -> None:
    lines = [f'turbofit_gateway_waiting{{model="{name}"}} {n}' for name, n in (("a", 1), ("b", 4))]
    text = "\n".join([*lines, 'turbofit_gateway_engine_up{model="b",engine="0"} 1']) + "\n"
    assert (now_of(text, "a").waiting, now_of(text, "b").waiting, now_of(text).waiting) == (1, 4, 5)
    assert [len(now_of(text, name).engines) for name in ("a", "b")] == [0, 1]
    assert now_of(text, "called otherwise").waiting == 5
    with pytest.raises(UsageError, match="not of turbofit's gateway"):
        now_of("process_cpu_seconds_total 3\n")


def test_fetched_with_a_key(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody's business
    assert now_of(fetch_page(server + "/", "right")).waiting == 3
    with pytest.raises(UsageError, match="401"):
        fetch_page(server, "wrong")


def test_what_answers_there_speaks_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(UsageError, match="nobody answers"):
            fetch_page(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    with pytest.raises(UsageError, match="nobody answers"):
        fetch_page("http://127.0.0.1:9")


PAGE = """# HELP lmdeploy:generation_tokens_total Tokens.
# TYPE lmdeploy:generation_tokens_total counter
lmdeploy:generation_tokens_total{engine="0",model_name="a\\"b,c\\\\d"} 124.0
lmdeploy:generation_tokens_total{engine="1"} 1.5e3
waiting 3
waiting_bucket{le="+Inf"} 7 1700000000
spaced { le = "0.5" , to="}" } 8 17.5
exemplar_total{le="1"} 9 # {trace_id="a} 3"} 0.67 1.5
broken{ 1
odd NaNo
"""


def test_samples_and_totals_by_their_labels() -> None:
    page = parse_page(PAGE)
    first, second = page.of("lmdeploy:generation_tokens_total")
    assert first == ({"engine": "0", "model_name": 'a"b,c\\d'}, 124.0)
    assert second.value == 1500.0
    assert page.of("waiting_bucket")[0].value == 7
    assert page.of("spaced") == [({"le": "0.5", "to": "}"}, 8.0)]
    assert page.of("exemplar_total") == [({"le": "1"}, 9.0)]
    assert page.of("broken") == page.of("odd") == []
    assert page.total("lmdeploy:generation_tokens_total") == 1624.0
    assert page.total("lmdeploy:generation_tokens_total", engine="1") == 1500.0
    assert page.total("waiting") == 3
    assert page.total("waiting", engine="1") is None
    assert page.total("nothing") is None
