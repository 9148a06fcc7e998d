from __future__ import annotations

from turbofit.observe.prometheus import parse_page

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
