"""The first thing that goes wrong, in the order of a start; deaths seen with the 0.18.0 binary."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.conftest import card, launch_on, machine_of
from turbofit.core.units import MIB
from turbofit.memory.start_outcome import outcome_at, outcome_without_cache
from turbofit.memory.turbomind.account import TurbomindAccount
from turbofit.memory.turbomind.weights import EngineConstants, load_constants


@pytest.fixture(scope="module")
def bare() -> EngineConstants:
    """The constants without what a pretend card does not charge; its pools grew by 2 MiB."""
    base = load_constants()
    return replace(
        base,
        cublas_handle=dict.fromkeys(base.cublas_handle, 0),
        torch_kernels=0,
        kernel_modules=0,
        pool_growth=dict.fromkeys(base.pool_growth, 0.0),
        pool_granularity=2 * MIB,
    )


def account_on(
    total: int,
    units: int,
    constants: EngineConstants,
    model: str = "internvl2-8b",
    at_once: int | None = None,
    **changes: object,
) -> TurbomindAccount:
    """An account on a card of so many MiB, 300 used; the context is taken out of ``used``."""
    machine = replace(machine_of(1), gpus=(card(total=total + 360, used=300),))
    base = {"max_batch_size": 128, "session_len": 32768, **changes}
    launch = launch_on(machine, model, units=units, **base)
    load = replace(launch.vision_load, units_per_forward=at_once)
    return TurbomindAccount(replace(launch, vision_load=load), constants)


@pytest.mark.parametrize(
    ("total", "units", "ratio", "kind"),
    [
        (15360, 13, 0.8, "load"), (24268, 13, 0.1, "hang"), (24268, 13, 0.95, "warmup"),
        # 0.905 starts with 98 MiB left; requests of 26 and 32 tiles pass, one of 40 aborts.
        (24268, 32, 0.905, "serves"), (24268, 40, 0.905, "request"),
    ],
)  # fmt: skip
def test_a_start_ends_as_the_binary_s_did(bare, total, units, ratio, kind):
    account = account_on(total, units, bare, at_once=units)
    fate = outcome_at(account, ratio)
    assert (fate.kind, fate.serves) == (kind, kind == "serves")
    if kind == "load":
        assert fate.missing > 0
    if kind == "hang":  # 104 blocks of the 130 that 8320 tokens need were there
        assert account.least_blocks == 130
        assert "waits without a message" in fate.text


@pytest.mark.parametrize(("total", "kind"), [(15800, "load"), (18200, "request")])
def test_no_ratio_fits_says_how_much_is_missing(constants, total, kind):
    account = account_on(total, 13, constants, max_batch_size=1000)
    assert account.best_ratio() is None
    fate = outcome_without_cache(account)
    assert fate.kind == kind
    assert fate.missing > 0
    assert "GPU 0" in fate.text
    # the same card with what is missing, and a page for the cache, fits
    enough = account_on(total + fate.missing // 2**20 + 64, 13, constants, max_batch_size=1000)
    assert enough.best_ratio() is not None or outcome_without_cache(enough).missing < fate.missing


def test_holes_in_pools_end_no_start(constants):
    """A server that had started on an H200 held nearly all of `pool_growth` less than forecast."""
    account = account_on(24268, 13, constants)
    (ledger,) = account.ledgers_at(0.9)
    assert ledger.steady > ledger.total - ledger.reserved
    assert outcome_at(account, 0.9).kind == "request"
    died = outcome_at(account, 0.95)
    assert died.kind == "warmup"
    assert "pool_growth" not in died.text


def test_a_margin_that_only_loading_misses_is_said_so():
    """Torch's staging is gone before the cache is sized, for which there is room."""
    machine = replace(machine_of(1), gpus=(card(total=19_900, used=0),))
    base = {"max_batch_size": 1, "session_len": 8192, "max_prefill_token_num": 2048}
    launch = launch_on(machine, "qwen3-8b", margin=256, **base)
    account = TurbomindAccount(launch, load_constants())
    (ledger,) = account.ledgers_at(0.0)
    assert 0 < ledger.headroom < ledger.margin
    assert ledger.total - ledger.peak > ledger.margin
    fate = outcome_without_cache(account)
    assert (fate.kind, fate.serves) == ("load_margin", True)
    assert fate.missing == ledger.margin - ledger.headroom
    assert fate.text.startswith("while it loads, GPU 0 is ")
    assert "torch's staging" in fate.text
    assert "no room for a cache" not in fate.text
