"""A torch engine's document, and what stands in for the card of gated delta nets."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import turbofit.pretend
from turbofit.core.errors import PackageError
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.pretend.command import find_turbofit, put_first
from turbofit.pretend.scenario import MIB, PretendGpu, Scenario
from turbofit.pretend.usage import read_timeline, read_usage
from turbofit.rehearse import packages
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.document import report
from turbofit.rehearse.packages import SERVED
from turbofit.rehearse.run import EndedRun
from turbofit.rehearse.spec import Spec
from turbofit.rehearse.torch import delta_nets
from turbofit.rehearse.torch.delta_nets import most_chunks
from turbofit.rehearse.torch.readings import read_run

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


ORDER = (
    "import",
    "build",
    "sizing",
    "graph runner",
    "cache",
    "warm-up",
    "ready",
    "case a",
    "case b",
)


def row(phase: str, allocated: int, reserved: int, peak: int, reserved_peak: int) -> dict[str, Any]:
    return {
        "phase": phase,
        "gpu": 0,
        "requested": (allocated - 1) * MIB,
        "allocated": allocated * MIB,
        "reserved": reserved * MIB,
        "allocated_peak": peak * MIB,
        "reserved_peak": reserved_peak * MIB,
        "retries": 0,
    }


def document(folder: Path, *, dies: bool = False) -> dict[str, Any]:
    held, lines = 0, [f"I 7 1 0\nN python child\nK 0 {300 * MIB} 0"]
    for number, (phase, size) in enumerate(
        {"build": 4000, "cache": 9000, "warm-up": 9100, "case a": 9900, "case b": 9950}.items()
    ):
        more, held = size * MIB - held, size * MIB
        lines.append(f"P {phase}\nA 0 0 0 {more} {held} {number:x}")
    (folder / "7.timeline").write_text("\n".join(lines) + "\n")
    rows = [
        row("build", 3900, 4000, 3950, 4000),
        row("sizing", 3900, 4000, 3900, 4000),
        row("graph runner", 3900, 4000, 3900, 4000),
        row("cache", 8900, 9000, 8900, 9000),
        row("warm-up", 8920, 9100, 8990, 9100),
        row("ready", 8920, 9100, 8920, 9100),
        row("case a", 8930, 9900, 9800, 9900),
        row("case b", 8930, 9950, 9500, 9950),
    ]
    cases = [
        {"name": "a", "tokens": [500], "statuses": {"finished": 1}},
        {"name": "b", "tokens": [16] * 4, "statuses": {"finished": 4}},
    ]
    told: dict[str, Any] = {
        "seconds": dict.fromkeys(ORDER, 1.0),
        "cases": cases,
        "done": True,
        "cache": {
            "num_gpu_blocks": 100, "block_size": 64, "cache_max_entry_count": 0.5,
            "max_prefill_token_num": 8192, "max_batches": 128,
        },
        "free_at_sizing": [8000 * MIB],
        "block_bytes": [50 * MIB],
    }  # fmt: skip
    log = ""
    if dies:
        cases[1]["statuses"] = {"unavailable": 4}
        log = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB."
    shared = SimpleNamespace(
        processes=(), peak=(10250 * MIB,), pinned_peak=0, allocations=0, pinned_allocations=0
    )
    scenario = Scenario((PretendGpu("Some card", total=12000 * MIB, used=100 * MIB),))
    usages = [read_usage(read_timeline(path)) for path in folder.glob("*.timeline")]
    ran: Any = SimpleNamespace(
        code=0,
        exit_code=0,
        seconds=9.0,
        command=(),
        shared=shared,
        scenario=scenario,
        usages=usages,
    )
    (folder / "records").mkdir()
    record = {"pid": 7, "number": 9, "rows": rows}
    (folder / "records" / "7.json").write_text(json.dumps(record))
    ended = EndedRun(Spec(scenario, "x", "pytorch"), ran, told, log.splitlines(), "", folder)
    return report(ended, read_run(ended), {"torch": "2.12.1", "lmdeploy": "0.18.0"})


def test_a_start_in_parts_and_its_cases(tmp_path: Path) -> None:
    made = document(tmp_path)
    assert (made["outcome"], made["death"]) == ("served", None)
    (card,), (terms,) = made["gpus"], made["terms"]
    assert card["contexts"] == 300 * MIB
    assert card["left_at_peak"] == (12000 - 100 - 10250) * MIB
    assert card["phases"]["cache"]["allocated"] == 8900 * MIB
    # Of the account, contexts included.
    assert card["phases"]["case a"]["peak"] == 10200 * MIB
    assert made["cases"][0]["peak"] == [10200 * MIB]
    assert made["cache"]["tokens"] == 6400
    assert made["cache"]["region"] == [5000 * MIB]
    assert terms == {
        "weights": 3899 * MIB,
        "load_fragmentation": 101 * MIB,
        "kv_cache": 5000 * MIB,
        "pool_warmup": 80 * MIB,  # what it keeps idle beyond the cache's
        "a": (9800 - 8930) * MIB,  # above what the first request left for good
        "b": (9500 - 8930) * MIB,
    }
    assert [case["transient"] for case in made["cases"]] == [[870 * MIB], [570 * MIB]]


def test_a_death_in_a_case(tmp_path: Path) -> None:
    made = document(tmp_path, dies=True)
    assert made["outcome"] == "out_of_memory"
    assert made["death"]["phase"] == "case b"
    assert made["death"]["message"] == "CUDA out of memory. Tried to allocate 640.00 MiB."


_PROGRAM = """
import sys
from lmdeploy import tokenizer
from lmdeploy.hf_configs import config_from_pretrained
from lmdeploy.serve.parsers import ResponseParserManager
from lmdeploy.utils import get_hf_gen_cfg

internvl, intern_s1_pro = sys.argv[1:]
assert config_from_pretrained(internvl, trust_remote_code=True).llm_config.hidden_size == 1024
assert get_hf_gen_cfg(intern_s1_pro, trust_remote_code=True)["eos_token_id"] == 2
assert tokenizer.GptOssTokenizer is tokenizer.HuggingFaceTokenizer
assert ResponseParserManager.get("gpt-oss") is ResponseParserManager.get("default")
"""


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_a_new_process_reads_stand_ins_of_families_with_code_of_their_own(tmp_path: Path) -> None:
    folders = [
        checkpoint_for(resolve_model(name), tmp_path / name)
        for name in ("internvl3.5-1b", "intern-s1-pro")
    ]
    env = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    put_first(env, "PYTHONPATH", str(SERVED))
    find_turbofit(env)
    put_first(env, "PYTHONPATH", str(Path(turbofit.pretend.__file__).parent / "inside"))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, folders)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
