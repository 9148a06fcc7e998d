"""What LoRA adapters take on each rank of the PyTorch engine, beside the base."""

from __future__ import annotations

from pathlib import Path

import pytest

import turbofit
from bench.rehearsal.adapters import ATTENTION, write_adapter
from tests.memory.pytorch.test_account import account
from turbofit.core.errors import NoKernelError, UsageError
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.adapters import adapter_bytes, adapter_files, adapter_problem
from turbofit.memory.pytorch.weights import load_constants
from turbofit.model.adapters import layers_of, with_adapters
from turbofit.model.source import resolve_model

QWEN = resolve_model("qwen2.5-0.5b")


def rounded(size: int) -> int:
    return -(-size // 512) * 512


def by_hand(tp: int) -> int:
    """Qwen2.5-0.5B by hand: q and o of rank 8 + 4, down of 8; 24 layers, 896 channels, 4864."""
    whole = [(12, 896, 896 // tp), (12, 896 // tp, 896), (8, 4864 // tp, 896)]
    each = sum(rounded(r * i * 2) + rounded(r * o * 2) + 512 for r, i, o in whole)
    return 24 * each + 3 * 1024


@pytest.mark.parametrize("tp", [1, 2])
def test_matrices_are_cut_where_the_layers_are(tp: int, tmp_path: Path) -> None:
    first = write_adapter(QWEN, tmp_path / "a", 8, ("q_proj", "o_proj", "down_proj"))
    second = write_adapter(QWEN, tmp_path / "b", 4, ("q_proj", "o_proj"))
    model = with_adapters(QWEN, [f"a={first}", f"b={second}"], only_text=False)
    assert adapter_bytes(model, tp) == by_hand(tp)
    assert adapter_files(model) == sum(lora.file_bytes for lora in model.loras)
    third = with_adapters(QWEN, [f"{n}={second}" for n in "xyz"], only_text=False)
    assert adapter_files(third) == 2 * third.loras[0].file_bytes
    assert not adapter_bytes(QWEN, tp)
    assert not adapter_files(QWEN)


@pytest.mark.parametrize("tp", [1, 2])
def test_stacked_matrices_count_with_their_own_rank(tp: int, tmp_path: Path) -> None:
    """InternVL2-1B by hand: q and v of rank 8 are one of rank 16, with all outputs of q, k, v."""
    model, inside = resolve_model("internvl2-1b"), "language_model.model.layers"
    adapter = write_adapter(model, tmp_path / "a", 8, ("q_proj", "v_proj"), layers=inside)
    model = with_adapters(model, [f"a={adapter}"], only_text=False)
    each = rounded(16 * 896 * 2) + rounded(16 * (896 + 2 * 128) // tp * 2) + 512
    assert adapter_bytes(model, tp) == 24 * each + 1024
    assert adapter_files(model) == 24 * 16 * (896 + 896 + 2 * 128) * 4
    assert (model.loras[0].rank, model.loras[0].renamed) == (16, True)


@pytest.mark.parametrize(("backend", "kept"), [("ray", True), ("mp", False)])
def test_ray_workers_keep_what_choosing_kernels_took(
    backend: str, kept: bool, tmp_path: Path
) -> None:
    """Blocks stand in the fixed segment that the first CUDA graph would free."""
    adapter = write_adapter(QWEN, tmp_path / "a", 8, ("q_proj",))
    model = with_adapters(QWEN, [f"a={adapter}"], only_text=False)
    pools = [
        next(
            term.bytes
            for term in account(one, "2xa100-80g", tp=2, distributed_executor_backend=backend)
            .ledgers_at(0.5)[0]
            .terms
            if term.term == POOL_WARMUP
        )
        for one in (QWEN, model)
    ]
    assert (pools[1] - pools[0] > 256 * MIB) == kept


def test_a_stacked_query_is_dealt_as_keys_are(tmp_path: Path) -> None:
    model, inside = resolve_model("internvl2-1b"), "language_model.model.layers"
    query = write_adapter(model, tmp_path / "b", 8, ("q_proj",), layers=inside)
    model = with_adapters(model, [f"a={query}"], only_text=False)
    assert adapter_problem(model, 2) is None
    assert "2 KV heads" in str(adapter_problem(model, 4))


@pytest.mark.parametrize("tp", [1, 2])
def test_the_gates_of_a_delta_net_are_one_module(tp: int, tmp_path: Path) -> None:
    """Qwen3.5-0.8B by hand: 18 delta nets, 1,024 channels, 16 value heads of 128; 6 attentions."""
    base, inside = resolve_model("qwen3.5-0.8b"), "model.language_model.layers"
    modules = ("q_proj", "in_proj_b", "in_proj_a", "out_proj")
    adapter = write_adapter(base, tmp_path / "a", 8, modules, layers=inside)
    model = with_adapters(base, [f"a={adapter}"], only_text=False)
    sizes = [(1024, 4096 // tp), (1024, 32 // tp), (2048 // tp, 1024)]
    queries, gates, outputs = (
        rounded(16 * inputs * 2) + rounded(16 * outs * 2) + 512 for inputs, outs in sizes
    )
    assert adapter_bytes(model, tp) == 6 * queries + 18 * (gates + outputs) + 3 * 1024
    assert (model.loras[0].rank, adapter_problem(model, tp)) == (16, None)
    joined = write_adapter(base, tmp_path / "b", 8, ("in_proj_qkv",), layers=inside)
    problem = adapter_problem(with_adapters(base, [f"a={joined}"], only_text=False), tp)
    assert ("in_proj_qkv" in str(problem)) is (tp == 2)


@pytest.mark.parametrize(
    ("name", "module", "possible"),
    [
        ("internvl2-8b-awq", "w1", False),
        ("internvl2-8b-awq", "wo", True),
        ("internvl2-8b", "w1", True),
        ("qwen2.5-7b-awq", "up_proj", True),
        ("qwen3.5-9b-awq", "in_proj_b", True),
    ],
)
def test_joined_modules_that_are_quantised(
    name: str, module: str, possible: bool, tmp_path: Path
) -> None:
    """LMDeploy's class of the two has no way to part a joined B, which Qwen2.5's are not."""
    model = resolve_model(name)
    layers = layers_of(model) or ""
    adapter = write_adapter(model, tmp_path / "a", 8, (module,), layers=layers)
    model = with_adapters(model, [f"a={adapter}"], only_text=False)
    assert adapter_problem(model, 1) is None
    assert (adapter_problem(model, 2) is None) is possible


def test_kv_heads_that_are_repeated_cannot_be_dealt(tmp_path: Path) -> None:
    keys = write_adapter(QWEN, tmp_path / "a", 8, ATTENTION)
    model = with_adapters(QWEN, [f"a={keys}"], only_text=False)
    assert adapter_problem(model, 2) is None
    assert "2 KV heads" in str(adapter_problem(model, 4))
    query = write_adapter(QWEN, tmp_path / "b", 8, ("q_proj",))
    assert adapter_problem(with_adapters(QWEN, [f"a={query}"], only_text=False), 4) is None


@pytest.mark.parametrize(
    ("card", "rank", "served"),
    [("t4", 64, True), ("t4", 128, False), ("rtx3090", 64, True), ("rtx3090", 128, False),
     ("a100-40g", 128, True), ("a100-40g", 256, False), ("h100", 256, True), ("h100", 512, False)],
)  # fmt: skip
def test_ranks_that_a_card_has_shared_memory_for(
    card: str, rank: int, served: bool, tmp_path: Path
) -> None:
    """Shared memory that Triton 3.7.1 asks for; rank 128 ended a rehearsal on an RTX 3060."""
    adapter = f"a={write_adapter(QWEN, tmp_path / 'a', rank, ('q_proj',))}"
    if served:
        assert turbofit.plan("qwen2.5-0.5b", on=f"1x{card}", adapters=(adapter,)).fits
        return
    with pytest.raises(NoKernelError, match=f"a has rank {rank}, and .* shared memory"):
        turbofit.plan("qwen2.5-0.5b", on=f"1x{card}", adapters=(adapter,))


def test_the_ledger_has_a_term_and_the_command_the_names(tmp_path: Path) -> None:
    adapter = write_adapter(QWEN, tmp_path / "a", 64)
    plan = turbofit.plan(
        "qwen2.5-0.5b", on="1xrtx3060", adapters=(f"sql={adapter}",), max_batch_size=8
    )
    ledger = plan.engines[0].ledgers[0]
    assert plan.backend.name == "pytorch"
    assert ledger.bytes_of("weights.adapters") == adapter_bytes(plan.model, 1)
    command = plan.engines[0].command
    assert command is not None
    assert command.argv[command.argv.index("--adapters") + 1] == f"sql={adapter}"
    assert plan.engines[0].lmdeploy_settings()["adapters"] == {"sql": str(adapter)}
    bare = turbofit.plan("qwen2.5-0.5b", on="1xrtx3060", engine="pytorch", max_batch_size=8)
    loaded = ledger.load_peak - bare.engines[0].ledgers[0].load_peak
    files = plan.model.loras[0].file_bytes
    assert abs(loaded - adapter_bytes(plan.model, 1) - files) < 3 * MIB  # whole pages of torch's
    assert turbofit.Plan.from_json(plan.to_json()) == plan


def test_other_engines_say_the_two_ways(tmp_path: Path) -> None:
    adapter = write_adapter(QWEN, tmp_path / "a", 8)
    with pytest.raises(UsageError, match="adapters is no option of the turbomind") as caught:
        turbofit.plan(
            "qwen2.5-0.5b", on="1xrtx3060", engine="turbomind", adapters=(f"a={adapter}",)
        )
    assert "turbofit merge" in caught.value.hint
    assert 'engine="pytorch" holds the base once' in caught.value.hint


def test_the_input_of_down_proj_is_copied_in_a_prefill(tmp_path: Path) -> None:
    """Seen on pretend GPUs: 1,000 tokens of Qwen2.5-7B took 37,000 KiB more."""
    base = resolve_model("qwen2.5-7b")
    settings, constants = Settings(), load_constants()
    peaks = []
    for name, modules in {"o": ("o_proj",), "d": ("o_proj", "down_proj")}.items():
        adapter = write_adapter(base, tmp_path / name, 8, modules)
        model = with_adapters(base, [f"a={adapter}"], only_text=False)
        work = Activations(model, settings, constants)
        peaks.append(work.prefill(Prefill(tokens=1000, context=1000)))
    assert peaks[1] - peaks[0] == 1000 * 18944 * 2
