"""`bench/accuracy`: the program on a few rows, and RESULTS.md from the rows beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.accuracy.__main__ import HERE, as_json, main
from bench.accuracy.report import report
from bench.accuracy.rows import read_rows, write_rows
from bench.accuracy.score import score, summary

ROWS = [
    {
        "id": "table",
        "source": "a documentation's table (of 2024)",
        "date": "2024-07-30",
        "engine": "turbomind",
        "engine_version": "~0.5.2 (a later page says 0.5.3)",
        "model": "InternVL2-8B",
        "gpus": [{"name": "A100-80G", "total_mib": 81920}],
        "n_gpus": 1,
        "tp": 1,
        "quant": "bf16",
        "cache_max_entry_count": 0.2,
        "observed": {"kind": "nvidia_smi_mib", "outcome": "ok", "used_mib_per_gpu": 30624},
        "notes": "a sentence that must not travel",
    },
    {
        "id": "blocks",
        "source": "owner/repo#1",
        "date": "2025-06-03",
        "engine": "turbomind",
        "model": "InternVL2-8B",
        "gpus": [{"name": "RTX 3090", "total_mib": 24576}],
        "n_gpus": 4,
        "tp": 4,
        "cache_max_entry_count": 0.8,
        "observed": {
            "outcome": "oom",
            "kind": "kv_blocks",
            "block_size_mb": 2.0,
            "max_block_count": 1112,
            "free_at_kv_mb_derived": 2780,
        },
    },
    {
        "id": "too-large",
        "source": "owner/repo#2",
        "date": "2024-07-26",
        "engine": "turbomind",
        "engine_version": "0.5.2.post1",
        "model": "InternVL2-40B-AWQ",
        "gpus": [{"name": "RTX 4090", "total_mib": None}],
        "n_gpus": 1,
        "tp": 1,
        "quant": "awq + kv int4",
        "cache_max_entry_count": 0.8,
        "session_len": 500,
        "observed": {"outcome": "oom", "kind": "outcome", "phase": "load"},
    },
    {
        "id": "torch",
        "source": "owner/repo#3",
        "date": "2025-03-24",
        "engine": "pytorch",
        "model": "Qwen2.5-VL-7B-Instruct",
        "gpus": [{"name": "H100", "total_mib": None}],
        "n_gpus": 1,
        "tp": 1,
        "cache_max_entry_count": 0.9,
        "images_per_request": 2,
        "other_flags": "--eager-mode; images 1920x1080",
        "observed": {"outcome": "ok", "kind": "outcome"},
    },
    {
        "id": "nameless",
        "source": "owner/repo#4",
        "date": "2025-03-24",
        "engine": "turbomind",
        "model": "InternVL2-8B",
        "gpus": None,
        "n_gpus": None,
        "tp": None,
        "observed": {"outcome": "oom", "kind": "outcome"},
    },
    {
        "id": "other-engine",
        "source": "owner/repo#5",
        "date": "2025-03-24",
        "engine": "vllm",
        "model": "InternVL2-8B",
        "gpus": [{"name": "A100-80G", "total_mib": None}],
        "n_gpus": 1,
        "tp": 1,
        "observed": {"outcome": "ok", "kind": "gpu_used_gb", "gpu_used_gb": 70},
    },
]


@pytest.fixture
def observations(tmp_path: Path) -> Path:
    path = tmp_path / "observations.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return path


def test_json_document(observations, capsys):
    assert main(["--observations", str(observations), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"rows", "unscored", "summary"}
    keys = "id figure unit forecast observed error_mib error_pct_of_card outcome_forecast"
    assert all(set(row) == {*keys.split(), "outcome_observed"} for row in document["rows"])
    by = {(row["id"], row["figure"]): row for row in document["rows"]}
    used = by["table", "used"]
    assert used["error_mib"] == pytest.approx(used["forecast"] - used["observed"])
    assert abs(used["error_pct_of_card"]) < 1
    assert by["blocks", "block"]["forecast"] == by["blocks", "block"]["observed"] == 2
    assert by["blocks", "blocks"]["forecast"] == by["blocks", "blocks"]["observed"] == 1112
    assert by["blocks", "blocks"]["outcome_forecast"] == "oom_on_request"
    assert by["too-large", "outcome"]["outcome_forecast"] == "oom"
    assert by["torch", "outcome"]["outcome_forecast"] == "ok"
    assert {one["id"]: one["missing"] for one in document["unscored"]} == {
        "nameless": "the card",
        "other-engine": "no account of the engine (vllm) is scored here",
    }


def test_summary_counts(observations):
    scored, unscored = score(read_rows(observations))
    facts = summary(scored, unscored)
    assert (facts["rows"], facts["scored"]) == (6, 4)
    assert (facts["with_a_figure"], facts["with_a_figure_scored"]) == (2, 2)
    assert facts["by_source"]["a documentation's table"]["count"] == 1
    assert facts["wrong_outcomes"] == []
    assert facts["confusion"] == {"ok": {"ok": 2}, "oom": {"oom_on_request": 1, "oom": 1}}


def test_a_miss_is_counted_with_its_sign(observations):
    rows = read_rows(observations)
    low = [type(r)(**{**_fields(r), "figures": {"used_mib": 40000}}) for r in rows[:1]]
    scored, unscored = score(low)
    errors = summary(scored, unscored)["by_source"]["a documentation's table"]
    assert errors["worst_mib"] < -9000
    assert errors["worst_percent"] == errors["median_signed_percent"] < -10


def test_contradicted_outcomes_are_named(observations):
    rows = read_rows(observations)
    turned = {"ran": "oom", "oom": "ran"}
    swapped = [
        type(r)(**{**_fields(r), "outcome": turned[r.outcome], "free_mib": None})
        for r in rows
        if r.id in ("table", "too-large")
    ]
    scored, unscored = score(swapped)
    assert summary(scored, unscored)["wrong_outcomes"] == ["table", "too-large"]


def test_our_format_holds_facts_only_and_gives_the_same_scores(observations, tmp_path):
    rows = read_rows(observations)
    own = tmp_path / "own.jsonl"
    write_rows(own, rows)
    assert "sentence" not in own.read_text()
    assert "later page" not in own.read_text()
    again = read_rows(own)
    assert again == rows
    assert as_json(*score(again)) == as_json(*score(rows))


def test_a_sum_over_cards_is_compared_with_the_sum(tmp_path):
    """A maintainer counts the whole model: 140 GB of weights and 15 of cache on four cards."""
    row = {
        "id": "sum",
        "source": "InternLM/lmdeploy#684",
        "date": "2023-11-14",
        "engine": "turbomind",
        "engine_version": "0.0.10",
        "model": "llama2-70B",
        "gpus": [{"name": "A100", "total_mib": 40960}],
        "n_gpus": 4,
        "tp": 4,
        "cache_max_entry_count": 12,
        "session_len": 4104,
        "observed": {"outcome": "oom", "kind": "figure", "weights_gb": 140, "kv_gb": 15},
    }
    scores = {s.figure: s for s in _scored(tmp_path, row).scores}
    assert abs(scores["weights"].percent) < 7  # 140 are decimal
    assert abs(scores["cache"].percent) < 1
    assert scores["weights"].card_mib == 4 * 40960


@pytest.mark.parametrize(
    ("name", "quant", "model", "method"),
    [
        ("OpenGVLab/InternVL3_5-2B-HF", None, "InternVL3_5-2B-HF", None),
        ("OpenGVLab/InternVL3-8B-hf", None, "InternVL3-8B-hf", None),
        ("InternVL3-78B W4A16 (LLMC, vision not quantised)", "awq", "InternVL3-78B", "awq"),
        ("Qwen/Qwen3-30B-A3B GPTQ-Int4", "gptq", "Qwen3-30B-A3B", "gptq"),
        ("QuantTrio/Qwen3.6-27B-AWQ", "awq", "Qwen3.6-27B", "awq"),
        ("cyankiwi/Qwen3.8-27B-AWQ-INT4 (group 32)", "w4a16", "Qwen3.6-27B", "awq"),
        ("Qwen/Qwen3.8-27B-FP8", "fp8", "Qwen3.6-27B", "fp8"),
    ],
)
def test_models_are_found_as_people_write_them(tmp_path, name, quant, model, method):
    found = _scored(tmp_path, ROWS[0] | {"model": name, "quant": quant}).inputs.model
    assert found.name == model
    assert (found.quantization.method if found.quantization else None) == method


@pytest.mark.parametrize(
    ("card", "found", "known"),
    [
        ({"name": "80 GB card of a cloud (A100 or H100; driver 575)"}, "A100-SXM4-80GB", False),
        ({"name": "A100", "total_mib": 40960}, "A100-SXM4-40GB", True),
        ({"name": "A100", "total_mib": 81920}, "A100-SXM4-80GB", True),
        ({"name": "Tesla V100 32GB", "total_mib": 32768}, "V100-SXM2-32GB", True),
        ({"name": "23GB GPU x4"}, "23GB GPU x4", True),
    ],
)
def test_cards_are_found_as_people_write_them(tmp_path, card, found, known):
    inputs = _scored(tmp_path, ROWS[0] | {"gpus": [card]}).inputs
    assert found in inputs.machine.gpus[0].name
    assert inputs.card_known == known


def test_figures_of_logs_and_of_the_host_are_read(tmp_path):
    row = ROWS[0] | {
        "engine_version": "0.16.0",
        "cache_max_entry_count": 0.8,
        "other_flags": "--quant-policy 8",
        "observed": {
            "kind": "gb_decimal",
            "outcome": "ok",
            "gpu_after_load_gb": 70.0,
            "free_at_cache_mib": 64000.0,
            "max_cached_tokens": 900_000,
            "host_used_before_gib": 10,
            "host_used_after_gib": 30,
            "host_shared_after_gib": 18,
        },
    }
    scored = _scored(tmp_path, row)
    assert scored.inputs.quant_policy == 8
    seen = {s.figure: s.observed for s in scored.scores}
    assert seen == {
        "used": 66757.2,
        "free": 64000.0,
        "tokens": 900_000,
        "host": 20480,
        "pinned": 18432,
    }
    host = next(s for s in scored.scores if s.figure == "host")
    assert host.percent_of_card is None
    assert host.forecast > host.observed


def _scored(tmp_path, row):
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    scored, unscored = score(read_rows(path))
    assert not unscored, unscored
    return scored[0]


def test_what_cannot_be_read_is_said_in_two_lines(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1}\n')
    assert main(["--observations", str(broken)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert main(["--observations", str(tmp_path / "absent")]) == 2


def test_results_come_from_the_rows_beside_them():
    scored, unscored = score(read_rows(HERE / "rows.jsonl"))
    assert (HERE / "RESULTS.md").read_text() == report(scored, unscored), (
        "run python -m bench.accuracy --write"
    )


def test_bars_hold():
    scored, unscored = score(read_rows(HERE / "rows.jsonl"))
    facts = summary(scored, unscored)
    assert facts["share_scored"] >= 0.9
    table = [
        abs(s.percent_of_card)
        for one in scored
        if "internvl2.0" in one.row.source and one.row.engine == "turbomind"
        for s in one.scores
    ]
    assert len(table) >= 20
    assert sorted(table)[len(table) // 2] <= 1
    assert max(table) <= 3
    for block in facts["blocks"]:
        limit = 0 if block["figure"] == "block" else 2
        assert abs(block["error_percent"]) <= limit


def _fields(row):
    return {name: getattr(row, name) for name in row.__struct_fields__}
