"""The weights of the PyTorch engine's ranks, and what torch's allocator is told, in MiB."""

from __future__ import annotations

from functools import partial

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import card, cut, machine_of
from tests.memory.pytorch.test_account import CONSTANTS, account
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch import weights as pytorch_weights
from turbofit.memory.pytorch.activations import Activations
from turbofit.memory.pytorch.weights import (
    environment,
    expert_channels,
    largest_loaded,
    segments,
    share_of,
    weight_classes,
)
from turbofit.memory.turbomind.weights import load_constants as load_turbomind
from turbofit.memory.turbomind.weights import weight_classes as turbomind_classes
from turbofit.model.drafts import with_draft
from turbofit.model.parameters import parameters
from turbofit.model.source import resolve_model
from turbofit.planning.commands import commands, private_commands


def terms(model: Model, capability: tuple[int, int] | str, **changes: object) -> dict[str, int]:
    gpu = replace(card(total=80000), compute_capability=capability)
    machine = replace(machine_of(1), gpus=(gpu,))
    ledger = account(model, machine, session_len=4096, **changes).ledgers_at(0.5)[0].terms
    return {term.term: term.bytes for term in ledger}


def test_awq_is_held_twice_on_hopper_alone():
    model = resolve_model("qwen2.5-7b-awq")
    classes = weight_classes(model, 1)
    packed = classes["attention"] + classes["mlp"]
    hopper = terms(model, (9, 0))
    assert packed < hopper["weights.packed_copy"] < 1.12 * packed
    assert "packed_kernels" in hopper
    assert terms(model, "NA")["weights.packed_copy"] == hopper["weights.packed_copy"]
    for other in ((8, 6), (10, 0)):
        assert "weights.packed_copy" not in terms(model, other)
        assert "packed_kernels" not in terms(model, other)
    assert "weights.packed_copy" not in terms(resolve_model("qwen2.5-7b"), (9, 0))


def test_layers_left_unpacked_are_counted_from_the_files():
    """Files that hold 600 MiB more than packed layers would: the rest stays at 16 bits."""
    model = resolve_model("internvl2-8b-awq")
    exact = replace(model, source=replace(model.source, sizes="file"))
    more = replace(exact, weight_bytes=model.weight_bytes + 600 * MIB)
    for classes in (weight_classes, partial(turbomind_classes, constants=load_turbomind())):
        assert classes(more, 4)["unpacked"] == 600 * MIB // 4
        assert "unpacked" not in classes(exact, 4)


@pytest.mark.parametrize(
    ("tp", "backend", "kind"),
    [
        (1, None, "expandable"), (1, "mp", "expandable"), (1, "ray", "fixed"),
        (2, None, "fixed"), (2, "mp", "expandable"), (2, "ray", "fixed"),
    ],
)  # fmt: skip
def test_rays_workers_refuse_expandable_segments_whatever_their_number(tp, backend, kind):
    settings = Settings(tp=tp, distributed_executor_backend=backend)
    assert segments(settings) == kind
    names = environment(settings, resolve_model("qwen2-vl-7b"))
    assert ("PYTORCH_CUDA_ALLOC_CONF" in names) is (kind == "expandable")


@pytest.mark.parametrize(("on", "known"), [("1xh100", True), ("1xrtx4090", True), ("1xl4", False)])
def test_torch_is_held_to_its_plan_and_half_the_margin(monkeypatch, on, known):
    """On a real H100 torch took all but 111 MiB of the card, on pretend ones all but 12."""
    monkeypatch.setattr(pytorch_weights, "torch_takes_a_share", lambda: known)
    plan = turbofit.plan("qwen2.5-vl-7b", on=on, engine="pytorch")
    (launched,) = private_commands(plan, [5000], "/models/x", "name")
    words = launched.env["PYTORCH_CUDA_ALLOC_CONF"]
    # A torch that does not know the option would end, and so may one that a person starts.
    assert [one.env["PYTORCH_CUDA_ALLOC_CONF"] for one in commands(plan)] == [
        "expandable_segments:True"
    ]
    # An option that no plan counts takes of the margin.
    (more,) = private_commands(plan, [5000], "/models/x", "name", ["--hf-overrides"], held=False)
    assert more.env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    if not known:
        assert words == "expandable_segments:True"
        return
    segments, _, limit = words.partition(",per_process_memory_fraction:")
    assert segments == "expandable_segments:True"
    (ledger,) = plan.ledgers
    usable = ledger.total - ledger.reserved
    outside = ("cuda_context", "kernel_modules")
    most = float(limit) * usable + sum(t.bytes for t in ledger.terms if t.term in outside)
    assert most == pytest.approx(ledger.peak + ledger.margin / 2, abs=usable * 0.0001)
    assert usable - most > 120 * MIB


def test_what_a_budget_withholds_is_no_room_for_torch():
    """Another model's half of the card is in the margin: torch took 18 GiB of it."""
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xh100", engine="pytorch", budget="40GiB")
    (ledger,) = plan.ledgers
    outside = ("cuda_context", "kernel_modules")
    beside = sum(term.bytes for term in ledger.terms if term.term in outside)
    most = share_of([ledger]) * (ledger.total - ledger.reserved) + beside
    assert most == pytest.approx(ledger.peak + (ledger.margin - ledger.withheld) / 2)
    assert ledger.peak < most < ledger.budget


@pytest.mark.parametrize(
    ("model", "tp", "mib"),
    [
        (cut("gpt-oss-20b-bf16", 2), 1, 5349.4), (cut("glm-4.5-air", 3), 1, 11_766.6),
        (cut("deepseek-moe-16b", 3), 1, 3_202.8), (cut("phi-3.5-moe", 4), 1, 10_421.8),
        (cut("phi-3.5-moe", 4), 2, 5461.8), (cut("deepseek-moe-16b", 4), 1, 4324.0),
        (cut("deepseek-moe-16b", 4), 2, 2562.4), (cut("kimi-k2.5", 3, 48), 1, 9_150.7),
        (cut("kimi-k2.5", 3, 48), 2, 6_188.7), (cut("kimi-k2.5", 2, 384), 1, 15_681.7),
        (cut("kimi-k2.5", 2, 48, packed=False), 1, 10_637.1), (cut("minicpm3-4b", 4), 1, 836.8),
        (resolve_model("minicpm3-4b"), 1, 7770.3), (resolve_model("glm-4.7-flash"), 1, 57_523.7),
        (resolve_model("deepseek-v2-lite"), 1, 30_065.7),
        (resolve_model("deepseek-v2-lite"), 2, 15_066.6),
        (cut("qwen3-omni-30b-a3b", 4), 1, 8212.5),
        (cut("intern-s1-pro", 4, 64, packed=False), 1, 12_832.3),
    ],
)  # fmt: skip
def test_weights_are_the_engines(model: Model, tp: int, mib: float) -> None:
    assert sum(weight_classes(model, tp).values()) / MIB == pytest.approx(mib, abs=0.1)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "glm-4.5-air", "qwen3.5-35b-a3b"])
def test_a_layer_s_experts_are_laid_out_anew_on_each_rank(name: str) -> None:
    model = resolve_model(name)
    moe = model.text.moe
    layer = moe.experts * 3 * moe.intermediate * model.text.hidden * 2
    assert [largest_loaded(model, tp) for tp in (1, 2, 4)] == [layer, layer // 2, layer // 4]
    (ledger,) = account(name, on="1xh200").ledgers_at(0.5)
    assert ledger.load_peak >= sum(t.bytes for t in ledger.terms if t.phase == "weights") + layer


@pytest.mark.parametrize(
    ("name", "layers", "mib"),
    [
        ("qwen3-vl-30b-a3b", 4, 4892.65), ("qwen3-vl-30b-a3b", 6, 6189.67),
        ("qwen3-omni-30b-a3b", 4, 5127.2),
    ],
)  # fmt: skip
def test_weights_of_each_of_two_ranks_are_the_engines(name: str, layers: int, mib: float) -> None:
    """Qwen3-VL keeps the dense model that it made first; one rank alone frees it."""
    model = cut(name, layers)
    assert mib <= sum(weight_classes(model, 2).values()) / MIB <= mib + 1
    if "vl" in name:
        assert sum(weight_classes(model, 1).values()) == 2 * parameters(model.text, model.vision)


@pytest.mark.parametrize(
    ("name", "layers", "mib"),
    [
        ("qwen2-vl-2b", 28, 134.5), ("qwen2-vl-7b", 28, 150.9), ("internvl3-8b-hf", 28, 142.8),
        ("cogvlm-17b", 32, 367.5), ("deepseek-v2-lite", 27, 65.4), ("internvl3-8b", 2, 43.8),
        ("qwen2.5-0.5b", 2, 17.0),
    ],
)  # fmt: skip
def test_what_lies_between_weights_of_ray_workers(name: str, layers: int, mib: float) -> None:
    """``mib`` is what torch reserved beyond the weights of one of two ranks, on pretend GPUs."""
    (ledger, _) = account(cut(name, layers), on="2xa100-80g", tp=2).ledgers_at(0.5)
    charged = {term.term: term.bytes for term in ledger.terms}["load_fragmentation"]
    assert mib <= charged / MIB <= mib + 60


def test_between_weights_and_a_draft_with_experts_ray_workers_lose_what_was_seen() -> None:
    model = with_draft(cut("glm-4.5-air", 3), "deepseek_mtp", None, 1)
    (ledger, _) = account(model, on="2xa100-80g", tp=2).ledgers_at(0.5)
    charged = {term.term: term.bytes for term in ledger.terms}["load_fragmentation"]
    assert charged >= 264.1 * MIB


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b", "qwen2.5-3b-awq", "qwen3-vl-8b-fp8"])
def test_between_weights_of_a_kind_that_was_not_seen_ray_workers_lose_at_least_the_most(
    name: str,
) -> None:
    (ledger, _) = account(cut(name, 2), on="2xa100-80g", tp=2).ledgers_at(0.5)
    charged = {term.term: term.bytes for term in ledger.terms}["load_fragmentation"]
    assert charged >= 320 * MIB


@pytest.mark.parametrize(("tp", "channels"), [(1, 768), (4, 256), (8, 128)])
def test_experts_of_fp8_are_dealt_in_whole_blocks(tp: int, channels: int) -> None:
    """768 channels are six blocks of 128: of four ranks the first two have two of them."""
    model = resolve_model("qwen3-30b-a3b")
    packed = replace(model, quantization=Quantization(method="fp8", bits=8, group_size=128))
    assert Activations(packed, Settings(tp=tp), CONSTANTS).expert == channels
    assert expert_channels(model, tp) == 768 // tp
