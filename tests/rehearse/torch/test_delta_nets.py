"""What stands in for the card where gated delta nets are rehearsed."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from turbofit.core.errors import PackageError
from turbofit.model.presets import preset_model
from turbofit.rehearse import packages
from turbofit.rehearse.torch import delta_nets
from turbofit.rehearse.torch.delta_nets import most_chunks

INSIDE = Path(delta_nets.__file__).parent / "torch_inside"


def test_no_prompts_make_more_chunks() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        lengths = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 9))]
        chunks = sum(-(-length // 64) for length in lengths)
        assert chunks <= most_chunks(sum(lengths), len(lengths))
    # To the chunk where they are all as long as one, or one has all.
    assert most_chunks(7, 7) == 7
    for tokens in (1, 63, 64, 65, 8192):
        assert most_chunks(tokens, 1) == -(-tokens // 64)


def test_kernels_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PackageError, match=r"Qwen3NextForCausalLM runs its kernels") as error:
        packages.need_kernels(preset_model("qwen3-next-80b-a3b").text)
    assert error.value.hint == "pip install flash-linear-attention"
    packages.need_kernels(preset_model("qwen3-8b").text)


def test_every_module_asks_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tries two variants of each kernel, however it is wrapped."""
    index, chunk, other = (ModuleType(name) for name in ("fla.index", "fla.chunk", "torch.chunk"))
    tuned = SimpleNamespace(configs=[1, 2, 3, 4], fn=None)
    own: Any = lambda *_: None  # noqa: E731
    for module in (index, chunk, other):
        vars(module)["prepare_chunk_indices"] = own
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(chunk)["kernel"] = SimpleNamespace(fn=tuned)
    stand_in = delta_nets._Indices()
    delta_nets._replace(stand_in)
    assert vars(index)["prepare_chunk_indices"] is vars(chunk)["prepare_chunk_indices"] is stand_in
    assert vars(other)["prepare_chunk_indices"] is own
    assert tuned.configs == [1, 2]


def test_a_process_finds_kernels_that_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In TileLang's place; chunks are those of the step's own tokens, made once a step."""
    torch = pytest.importorskip("torch")
    rule: Any = ModuleType("lmdeploy.pytorch.backends.cuda.gated_delta_rule")
    seen: list[object] = []

    class Updater:
        def update(self, step_context: Any, _: Any) -> None:
            seen.append(step_context)

    rule.GatedDeltaStepMetaUpdater = Updater
    cuda: Any = ModuleType("lmdeploy.pytorch.backends.cuda")
    cuda.gated_delta_rule = rule
    fla: Any = ModuleType("fla.ops.chunk")
    fla.prepare_chunk_indices = None
    parents = ("lmdeploy", "lmdeploy.pytorch", "lmdeploy.pytorch.backends")
    for module in (*map(ModuleType, parents), cuda, rule, fla):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("tilelang", INSIDE / "tilelang" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    tilelang: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tilelang)

    @tilelang.jit(pass_configs={tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True})
    def kernel(*_: Any) -> None:
        raise AssertionError

    assert kernel(1, dtype="x")(torch.zeros(1)) is None
    step = SimpleNamespace(input_ids=torch.zeros(1, 100))
    Updater().update(step, None)
    assert seen == [step]
    lengths = torch.tensor([0, 70, 100])
    rule.prepare_chunked_gated_delta_rule(lengths)
    made = fla.prepare_chunk_indices(lengths, 64)
    assert made.shape == (3, 2)
    assert fla.prepare_chunk_indices(lengths, 64, cu_seqlens_cpu=None) is made
