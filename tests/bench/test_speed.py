"""The bench of speed: planted constants are found, and what is told is what was computed."""

from __future__ import annotations

import re
from datetime import date

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from bench.speed import rows as rows_module
from bench.speed.__main__ import main, results_of
from bench.speed.fit import FITTED, fit
from bench.speed.forecast import setup_of
from bench.speed.report import report
from bench.speed.rows import HERE, Row, read_rows
from bench.speed.score import median_of, p90_of, score
from bench.speed.sureties import first_tokens, kinds, surety_file
from turbofit.api import plan
from turbofit.planning.speed import rates
from turbofit.planning.throughput import Errors, errors_of

PLANTED = replace(
    rates(FITTED), memory_efficiency=0.7, compute_efficiency=0.6, layer_seconds=60e-6
)  # fmt: skip


def row(number: int = 0, source: str = "one", model: str = "qwen2.5-7b", **fields: object) -> Row:
    plain = Row(
        id=f"{source}-{number}", source=source, engine="turbomind", version="0.6.2", name=model,
        card="c", model=model, on="1xa100-80g", concurrency=1, prompt=128, output=256,
        output_tokens_per_second=1.0, why="planted",
    )  # fmt: skip
    return replace(plain, **fields)


def planted(source: str = "one") -> list[Row]:
    """Rows of an engine that is as :data:`PLANTED` says."""
    rows = [
        row(number, source, model=model, concurrency=batch, prompt=prompt)
        for number, (model, batch, prompt) in enumerate(
            (model, batch, prompt)
            for model in ("qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-14b-awq")
            for batch in (1, 8, 64)
            for prompt in (16, 2048)
        )
    ]
    return [
        replace(one, output_tokens_per_second=score(setup_of(one), PLANTED).forecast)
        for one in rows
    ]


def test_planted_constants_are_found() -> None:
    found = fit([setup_of(one) for one in planted()], rates(FITTED))
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=0.05)
    others = set(type(found).__struct_fields__) - set(FITTED)
    assert all(getattr(found, name) == getattr(rates(), name) for name in others)


def test_the_error_of_cards_never_seen_stands_beside_the_other() -> None:
    errors = errors_of()
    seen, unseen = (
        errors[kind].median for kind in ("text with turbomind", "text with turbomind, other cards")
    )
    text = (HERE.parents[1] / "docs" / "speed.md").read_text()
    assert f"{seen:.1%}".replace("%", " %") in text
    assert f"{unseen:.1%}".replace("%", " %") in text


def test_turbo_quant_is_six_bits_a_pair_and_its_scales() -> None:
    plain = setup_of(row(source="kv", model="qwen3-30b-a3b"))
    packed = setup_of(row(source="kv", model="qwen3-30b-a3b", quant_policy=42))
    assert packed.work.kv_bytes / plain.work.kv_bytes == pytest.approx(102 / 512)
    assert packed.kv_tokens > 4.5 * plain.kv_tokens


def test_errors_are_written_by_kind_and_a_plan_tells_its_own() -> None:
    results = results_of(read_rows())
    written = msgspec.convert(yaml.safe_load(surety_file(results.kinds)), dict[str, Errors])
    assert written == results.kinds == errors_of()
    text = plan("qwen2.5-7b", on="1xa100-80g").throughput
    assert text.surety.word == "good"
    assert text.surety.seen
    assert f"median error {errors_of()['text with turbomind'].median:.1%}" in text.basis
    unseen = plan("qwen2.5-7b", on="1xrtx3090").throughput
    kind = "text with turbomind, other cards"
    assert (unseen.surety.kind, unseen.surety.word, unseen.surety.seen) == (kind, "fair", False)
    images = plan("qwen2-vl-2b", on="1xh100").throughput
    assert images.surety.kind == "images in patches with turbomind"
    torch = plan("qwen2-vl-2b", on="1xh100", engine="pytorch")
    assert torch.throughput.surety.word == "order"
    assert torch.throughput.requests_per_second is None
    assert any("engine answers images is unknown" in text for text in torch.warnings)


def test_a_withdrawn_source_stops_the_bench(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    taken_back = row(
        source="oliveagle/lmdeploy benchmarks-archive/python-turbomind_35b_awq_20260526"
    )
    monkeypatch.setattr(rows_module, "lines_of", lambda: [msgspec.json.encode(taken_back)])
    assert main([]) == 1
    told = capsys.readouterr().err
    assert "was withdrawn" in told
    assert "do not repeat" in told


def test_first_tokens_of_schedulers_that_are_gone_are_no_figure() -> None:
    queued = replace(row(concurrency=8), seconds_to_first_token=1.0)
    for version, told in (("0.4.0", []), ("0.18", ["first token among others"])):
        one = score(setup_of(replace(queued, version=version)), rates())
        assert [kind.partition(",")[0] for kind, _ in first_tokens([one])] == told
    alone = score(setup_of(replace(queued, concurrency=1, version="0.2.0")), rates())
    assert [kind for kind, _ in first_tokens([alone])] == ["first token alone, text with turbomind"]


def test_a_row_of_code_that_is_gone_is_shown_and_counts_in_no_kind() -> None:
    past = [one for one in read_rows() if one.past]
    assert {one.source for one in past} == {"InternLM/lmdeploy#3293"}
    assert not kinds([], [], [score(setup_of(one), rates()) for one in past])
    assert "qwen2-vl-2b-http" in (HERE / "RESULTS.md").read_text()


def test_images_of_both_cards_are_within_a_factor_of_one_and_a_half() -> None:
    """Four models, two cards, one and twelve threads of the host, one to 64 requests."""
    rows = [one for one in read_rows() if one.sizes and one.engine == "turbomind" and not one.past]
    scores = [score(setup_of(one), rates()) for one in rows]
    assert len(scores) == 15
    assert {one.setup.row.card for one in scores} == {"h100", "h200"}
    assert max(one.times_off for one in scores) < 1.5
    assert median_of(scores) < 0.25


def test_the_results_are_reproduced_and_plans_tell_their_errors() -> None:
    text, results = (HERE / "RESULTS.md").read_text(), results_of(read_rows())
    day = re.search(r"^\d{4}-\d\d-\d\d", text, re.MULTILINE)
    assert day
    assert report(results, date.fromisoformat(day[0])) == text
    assert median_of(results.judged) < 0.0455
    assert p90_of(results.judged) < 0.2035


def test_every_row_says_its_source_and_a_figure(capsys) -> None:
    rows = read_rows()
    assert len({row.id for row in rows}) == len(rows) > 60
    for row in rows:
        assert row.source
        assert row.requests_per_second or row.output_tokens_per_second
    assert main(["--fit"]) == 0
    assert "memory_efficiency: " in capsys.readouterr().out
