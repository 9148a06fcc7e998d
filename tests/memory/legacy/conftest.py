"""Accounts of older engines on empty A100-80G cards."""

from __future__ import annotations

from tests.memory.conftest import launch_on
from turbofit.machine.source import machine_from
from turbofit.memory.account import Account, EngineLaunch
from turbofit.memory.legacy.generations import Generation, TorchGeneration, generation_of
from turbofit.memory.legacy.turbomind import LegacyAccount, legacy_account
from turbofit.memory.turbomind.weights import load_constants
from turbofit.model.source import resolve_model


def launch_of(
    name: str, rules: Generation | TorchGeneration, tp: int, on: str, **changes: object
) -> EngineLaunch:
    """A launch with the defaults of a generation."""
    machine = machine_from(f"{tp}x{on}")
    settings = {
        "tp": tp,
        "max_batch_size": rules.batch_size(machine.gpus[0].name),
        "max_prefill_token_num": rules.prefill,
        "session_len": resolve_model(name).text.max_position_embeddings,
    }
    return launch_on(machine, name, units=None, **{**settings, **changes})


def account(
    name: str, version: str, *, tp: int = 1, on: str = "a100-80g", **changes: object
) -> LegacyAccount:
    rules = generation_of(version)
    settings = {"cache_block_seq_len": rules.cache.block_tokens, **changes}
    made = legacy_account(launch_of(name, rules, tp, on, **settings), load_constants(), rules)
    assert isinstance(made, LegacyAccount)
    return made


def terms(made: Account, ratio: float, gpu: int = 0) -> dict[str, int]:
    return {t.term: t.bytes for t in made.at(ratio).ledgers[gpu].ledger}
