"""Metrics of the engines and our own."""

from __future__ import annotations

from tests.support.gateway import (
    ask,
    chat,
    gateway,
    image_part,
)
from turbofit.gateway.http.metrics import merge


def test_metrics_are_the_engines_and_our_own() -> None:
    app, recorder = gateway(engines=2)
    recorder.pages = '# HELP a b\n# TYPE a gauge\na 1\na{x="y"} 2\n'
    assert ask(app, body=chat(image_part(detail="high"))).status == 200
    assert ask(app, body=chat(*[image_part()] * 27)).status == 400
    text = ask(app, "/metrics").body.decode()
    lines = text.splitlines()
    assert lines.count("# TYPE a gauge") == 1
    for line in (
        'a{engine="0"} 1', 'a{engine="1",x="y"} 2',
        'turbofit_gateway_limited_total{what="detail"} 1',
        'turbofit_gateway_refused_total{reason="too_many_images"} 1',
        'turbofit_gateway_units_in_flight{engine="0"} 0',
        "# TYPE turbofit_gateway_kv_tokens_reserved gauge",
        'turbofit_gateway_requests_total{route="/v1/chat/completions",status="200"} 1',
        "turbofit_gateway_images_total 1",
    ):  # fmt: skip
        assert line in lines, text


def test_pages_of_several_engines_become_one() -> None:
    page = """# HELP h Seconds.
# TYPE h histogram
h_bucket{le="1"} 3
h_sum 2.5
h_count 3
# HELP g x
# TYPE g gauge
g{path="a b{c}"} 1
bare 7
g2{} 4
"""
    lines = merge({0: page, 3: page}).splitlines()
    assert lines.count("# TYPE h histogram") == 1
    for line in (
        'h_bucket{engine="3",le="1"} 3', 'g{engine="0",path="a b{c}"} 1', 'bare{engine="3"} 7',
        'g2{engine="0"} 4',
    ):  # fmt: skip
        assert line in lines
    heads = [i for i, line in enumerate(lines) if line.startswith("h_")]
    assert heads == list(range(heads[0], heads[0] + 6))
    assert merge({}) == ""
    # LMDeploy's samples have ``engine``; Prometheus refuses a page with a label twice.
    page = 'n_total{engine="0",model_name="m,engine=0"} 4\nn_total{x="1",engine="2"} 5\n'
    assert merge({3: page}).splitlines() == [
        'n_total{engine="3",exported_engine="0",model_name="m,engine=0"} 4',
        'n_total{engine="3",x="1",exported_engine="2"} 5',
    ]
    assert merge({"a b": 'n{engine="0"} 1\n'}, "model") == 'n{model="a b",engine="0"} 1\n'
