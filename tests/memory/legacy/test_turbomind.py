"""Older TurboMind: order and sizes of its memory, and figures that were published."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
import turbofit.api
from tests.memory.conftest import check_ledger, launch_on
from turbofit.core.errors import PackageError
from turbofit.core.units import GIB, MIB
from turbofit.machine.kernels.census import released
from turbofit.machine.source import machine_from
from turbofit.memory.account import Account, EngineLaunch, batch_size
from turbofit.memory.engines import engine_for, engine_named
from turbofit.memory.legacy.generations import (
    Generation,
    TorchGeneration,
    generation_of,
)
from turbofit.memory.legacy.pytorch import LegacyPytorch
from turbofit.memory.legacy.turbomind import LegacyAccount, LegacyTurbomind, _Forward
from turbofit.memory.start_outcome import outcome_at
from turbofit.memory.turbomind.weights import load_constants
from turbofit.model.source import resolve_model


def test_a_version_chooses_the_account():
    assert isinstance(engine_named("turbomind", "0.6.3"), LegacyTurbomind)
    assert isinstance(engine_named("pytorch", "0.7"), LegacyPytorch)
    assert engine_named("turbomind", "0.18.0").version == "0.18"
    with pytest.raises(PackageError):
        engine_named("turbomind", "the newest")
    with pytest.raises(PackageError):  # LMDeploy has no such engine
        engine_for(resolve_model("gemma-3-4b"), "transformers", "0.7")


@pytest.mark.parametrize(
    ("model", "version", "defaults"),
    [
        ("internvl2-8b", "0.5.3", (128, 0.8, 64)), ("internvl2-8b", "0.6", (256, 0.8, 64)),
        ("llama-2-7b", "0.2.0", (128, 0.5, 128)),
    ],
)  # fmt: skip
def test_predict_with_the_defaults_of_the_version(model, version, defaults):
    made = turbofit.predict(model, on="a100-80g", lmdeploy=version)
    assert made.backend.version == version
    settings = made.engines[0].settings
    assert defaults == (
        settings.max_batch_size, settings.cache_max_entry_count, settings.cache_block_seq_len
    )  # fmt: skip


def test_the_kernels_of_a_version_are_its_release_s_whatever_is_installed(monkeypatch):
    monkeypatch.setattr("turbofit.machine.kernels.census.installed", lambda: released((0, 18, 0)))
    launch = launch_on("1xrtx5090", "internvl2-8b", session_len=4096)
    here = replace(launch, machine=replace(launch.machine, source="nvml"))
    assert engine_named("turbomind").missing_kernels(here) is None
    said = str(LegacyTurbomind("0.6.3").missing_kernels(here))
    assert "LMDeploy 0.6.3 has no code at all" in said
    assert said == LegacyTurbomind("0.6.3").missing_kernels(launch)


@pytest.mark.parametrize(
    ("version", "count", "option", "said"),
    [
        ("0.0.14", 48, {}, None),
        ("0.0.14", 48, {"quant_policy": 42}, "--quant-policy 42"),
        ("0.3.0", 0.5, {"quant_policy": 8}, "8-bit cache is `--quant-policy 4`"),
        ("0.3.0", 0.5, {"quant_policy": 4}, None),
        ("0.4.0", 0.5, {"quant_policy": 8}, None),
        ("0.5.3", 700, {"model_format": "awq"}, "--model-format awq"),
        ("0.15.0", 700, {}, "takes no block count"),
    ],
)
def test_a_count_of_blocks_was_taken_and_other_options_are_checked_beside_it(
    version, count, option, said
):
    options = {"dtype": "float16", "session_len": 4096, "cache_max_entry_count": count, **option}
    found = LegacyTurbomind(version).problem(launch_on("1xa100-80g", "internvl2-8b", **options))
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize("version", ["0.2.0", "0.5.3", "0.12.0"])
def test_a_plan_s_token_is_as_large_as_the_version_s_cache_makes_it(version):
    """The oldest kept no scales with each token: a quantised one was smaller than it is today."""
    made = turbofit.predict(
        "llama-2-7b", on="1xa100-80g", lmdeploy=version, quant_policy=4, session_len=4096
    )
    assert (
        made.engines[0].kv.region_bytes
        == made.engines[0].kv.tokens * made.engines[0].kv.bytes_per_token
    )


def launch_of(
    name: str, rules: Generation | TorchGeneration, tp: int, on: str, **changes: object
) -> EngineLaunch:
    """A launch with the defaults of a generation."""
    machine = machine_from(f"{tp}x{on}")
    settings = {
        "tp": tp, "max_batch_size": batch_size(rules.batch, machine.gpus[0].name),
        "max_prefill_token_num": rules.prefill,
        "session_len": resolve_model(name).text.max_position_embeddings, **changes,
    }  # fmt: skip
    return launch_on(machine, name, units=None, **settings)


def account(
    name: str, version: str, *, tp: int = 1, on: str = "a100-80g", **changes: object
) -> LegacyAccount:
    rules = generation_of(version)
    settings = {"cache_block_seq_len": rules.cache.block_tokens, **changes}
    made = LegacyTurbomind(version).account(launch_of(name, rules, tp, on, **settings))
    assert isinstance(made, LegacyAccount)
    return made


def terms(made: Account, ratio: float, gpu: int = 0) -> dict[str, int]:
    return {t.term: t.bytes for t in made.ledgers_at(ratio)[gpu].terms}


#: InternVL2 on A100-80G with LMDeploy 0.5.2, MiB as its documentation printed them.
PUBLISHED = [
    ("internvl2-2b", 1, 0.8, 67140),
    ("internvl2-2b", 4, 0.05, 7916),
    ("internvl2-8b", 1, 0.2, 30624),
    ("internvl2-8b", 2, 0.05, 14570),
    ("internvl2-26b", 1, 0.8, 77310),
    ("internvl2-26b-awq", 1, 0.1, 31656),
]


@pytest.mark.parametrize(("name", "tp", "ratio", "seen"), PUBLISHED)
def test_published_memory_within_one_percent_of_the_card(name, tp, ratio, seen):
    made = account(name, "0.5.2", tp=tp).ledgers_at(ratio)[0]
    assert abs(made.steady / MIB - seen) < 0.01 * made.total / MIB


@pytest.mark.parametrize("version", ["0.0.14", "0.2.6", "0.4.1", "0.9.2", "0.15"])
def test_lines_add_up_and_no_line_is_negative(version):
    for ledger in account("internvl2-8b", version, tp=2).ledgers_at(0.5):
        check_ledger(ledger)
        assert all(t.bytes >= 0 for t in ledger.terms)


def test_a_block_is_exact():
    assert account("internvl2-8b", "0.6.0", tp=4).block_bytes == 2 * MIB
    assert account("internvl2-8b", "0.6.0").block_bytes == 8 * MIB
    assert account("internvl2-8b", "0.2.6").block_bytes == 16 * MIB  # 128 tokens
    assert account("internvl2-8b", "0.6.0", quant_policy=8).block_bytes == 33 * MIB // 8
    # Before 0.4 the 8-bit cache is quant_policy 4.
    assert account("internvl2-8b", "0.2.6", quant_policy=4).block_bytes == 8 * MIB
    assert account("internvl2-8b", "0.4.0", quant_policy=4).block_bytes == 17 * MIB // 8


def test_a_cache_is_a_count_of_blocks_or_of_sessions_or_a_ratio_of_what_is_free():
    assert account("llama-2-7b", "0.1.0").blocks_at(1000) == 1000
    assert account("llama-2-7b", "0.7.0").blocks_at(1000) == 1000
    sessions = account("llama-2-7b", "0.0.14", max_batch_size=3, session_len=2048)
    assert sessions.block_bytes == GIB
    assert sessions.region_at(48) == 3 * GIB  # as requests come
    assert sessions.region_at(2) == 2 * GIB
    # Until 0.2.1 a ratio was of the card's whole memory.
    old, new = account("internlm2.5-7b", "0.2.1"), account("internlm2.5-7b", "0.2.2")
    usable = old.gpus[0].total - old.gpus[0].reserved
    assert old.region_at(0.5) == usable // 2 // old.block_bytes * old.block_bytes
    assert new.region_at(0.5) < new.free / 2


@pytest.mark.parametrize(
    ("version", "ratio", "kind"),
    [("0.0.14", 48, "request"), ("0.1.0", 0.5, "request"), ("0.2.0", 0.5, "buffers")],
)
def test_a_cache_that_only_requests_made_prevented_no_start(version, ratio, kind):
    """0.1.0 served InternLM-7B with 14 GB where 0.2.0 took half of the card at once (#1001)."""
    assert outcome_at(account("llama-2-7b", version, on="rtx3090"), ratio).kind == kind


@pytest.mark.parametrize(
    ("model", "tp", "ran"),
    [("qwen2.5-72b-awq", 4, 3098), ("qwen2.5-72b-awq", 1, 4880), ("internvl2-8b", 2, 1246)],
)
def test_what_torch_keeps_is_of_the_stored_weights_and_a_share_of_the_embedding(model, tp, ran):
    """``ran``: MiB that 0.6.4's loader left in torch's own allocator on a pretend card.

    lmdeploy#2996: of four cards with Qwen2.5-72B-AWQ the first has 3,182 MiB more in use.
    """
    kept = terms(account(model, "0.6.4", tp=tp), 0.5)["torch_cache"] / MIB
    assert ran <= kept <= ran * 1.08


@pytest.mark.parametrize("version", ["0.1.0", "0.2.1", "0.5.2", "0.11.1", "0.14.0"])
def test_a_cache_that_is_shorter_than_the_session_bounds_every_forward(version):
    """All sequences of a forward lie in the cache, and the engine cuts the session to it."""
    asked = account("internlm2.5-7b", version, on="rtx3090", session_len=131072)
    held = asked.tokens_at(0.02)
    assert held < 8192
    fits = account("internlm2.5-7b", version, on="rtx3090", session_len=held)
    case, short = terms(asked, 0.02), terms(fits, 0.02)
    assert (case["text_prefill"], case["sampling"]) == (short["text_prefill"], short["sampling"])
    # Buffers of a whole forward are made for the session as asked before 0.5.3.
    early = version in ("0.1.0", "0.2.1", "0.5.2")
    assert (case["hidden_states"] > short["hidden_states"]) == early
    if version == "0.11.1":  # prefixes that sequences share count in each
        shared = account(
            "internlm2.5-7b", version, on="rtx3090", session_len=131072, enable_prefix_caching=True
        )
        assert terms(shared, 0.02)["text_prefill"] > case["text_prefill"]


def test_the_warm_up_of_0_12_and_later_is_made_of_requests():
    """They are refused where they are longer than the session; the ones before asked no cache."""
    short = {"session_len": 4928, "on": "rtx3090"}
    forwards = {
        version: _Forward(account("internlm2.5-7b", version, **short), 4096)
        for version in ("0.0.14", "0.5.3", "0.7.3", "0.11.1", "0.12.0", "0.15.0")
    }
    assert {version: forward.warmup_tokens for version, forward in forwards.items()} == {
        "0.0.14": 0, "0.5.3": 0, "0.7.3": 8192, "0.11.1": 8192 + 128, "0.12.0": 4096,
        "0.15.0": 4096,
    }  # fmt: skip
    # A session was cut to the cache from 0.1 to 0.14.
    assert [forward.session_len for forward in forwards.values()] == [4928, *[4096] * 4, 4928]
    assert account("internvl2-8b", "0.5.3").engine_warmup == 0
    assert account("internvl2-8b", "0.6.2").engine_warmup > 0


def test_0_15_waits_for_blocks_that_its_cache_has_not():
    none = account("internvl2-26b", "0.5.2", on="rtx3090")
    assert none.free < 0
    assert none.cache_shortfall_at(0.8)
    assert not account("internvl2-2b", "0.5.2", on="rtx3090").cache_shortfall_at(0.8)
    small = account("internlm2.5-7b", "0.15.0", on="rtx3090")
    assert outcome_at(small, 0.01).kind == "hang"
    assert "waits without a message" in outcome_at(small, 0.01).text
    assert outcome_at(account("internlm2.5-7b", "0.14.0", on="rtx3090"), 0.05).kind != "hang"


@pytest.mark.parametrize(
    ("model", "card", "ratio", "free"),
    [
        ("internvl3.5-2b", "1xrtx5070ti", 0.1, 11_809_062_912),
        ("qwen3-8b", "1xh100", 0.8763, 67_322_773_504),
        ("qwen3-8b", "1xa100-80g", 0.8763, 68_538_073_088),
    ],
)
def test_free_memory_of_0_17_is_the_engines(monkeypatch, model, card, ratio, free):
    """As the binaries of 0.17.0, on the A100 of 0.16.0, read it on pretend cards.

    The GEMM workspace is taken before it, and on Hopper lm_head's copy is still held. Those cards
    held nothing else (no estimates), and their pools grew by 2 MiB, as the account's do here.
    """
    constants = replace(load_constants(), pool_granularity=2 * MIB)
    monkeypatch.setattr("turbofit.memory.turbomind.account.load_constants", lambda _: constants)
    plan = turbofit.api.predict(
        model,
        on=card,
        tp=1,
        engine="turbomind",
        lmdeploy="0.17.0",
        cache_max_entry_count=ratio,
        session_len=8192 if ratio < 0.5 else 32768,
    )
    gpu = plan.ledgers[0]
    early = [t for t in gpu.terms if t.phase in ("before", "context", "weights")]
    before = sum(t.bytes for t in early if t.basis != "estimate")
    assert 0 <= free - (gpu.total - gpu.reserved - before) <= 2 * MIB
