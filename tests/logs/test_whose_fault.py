"""Whose fault an error is: by files and commands, not by one more wording."""

from __future__ import annotations

import pytest

from tests.logs.conftest import explain, message, some
from turbofit.logs.causes import text_of

OUT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.02 GiB. GPU 0 has a total"
    " capacity of 79.14 GiB of which 512.25 MiB is free.\n"
)


def trace(*paths: str) -> str:
    frames = (f'  File "{path}", line 1, in f\n    g(x)\n' for path in paths)
    return "Traceback (most recent call last):\n" + "".join(frames)


LMDEPLOY = trace("/v/site-packages/lmdeploy/a.py", "/v/site-packages/torch/nn/m.py",
                 "/v/site-packages/lmdeploy/b.py")  # fmt: skip


@pytest.mark.parametrize("release", ["0.10.2", "0.17.0"])
def test_between_lmdeploy_s_own_files_the_release_is_at_fault(release: str) -> None:
    error = "TypeError: g() missing 1 required positional argument: 'a'\n"
    found = explain(f"LMDeploy: {release}+\ntransformers: 4.57.1\n{LMDEPLOY}{error}")
    assert (found.kind, release in found.what) == ("program_bug", True)
    assert found.first == text_of("newer lmdeploy").format(than=f"than {release} ")
    assert not any("pip list" in text for text in found.send)


def test_the_file_that_is_named_is_lmdeploy_s_where_torch_raised_the_error() -> None:
    inside = f"{LMDEPLOY}{trace('/v/site-packages/torch/nn/m.py').partition(chr(10))[2]}"
    found = explain(f"{inside}TypeError: g() missing 1 required positional argument: 'a'\n")
    assert "in b.py" in found.what


@pytest.mark.parametrize("code", ["raise RuntimeError(words)", "x = y.view(shape)", "assert x"])
@pytest.mark.parametrize("error", ["RuntimeError: shape '[1]' is invalid", "AssertionError"])
def test_an_operation_that_fails_is_told_from_words_for_people(code: str, error: str) -> None:
    found = explain(f"LMDeploy: 0.11.1\n{LMDEPLOY.replace('g(x)', code)}{error}\n")
    inside = not code.startswith("raise")
    assert message(found) == ("program_bug" if inside else "unknown")
    assert found.what.startswith("it failed inside LMDeploy 0.11.1 (b.py)") == inside


def test_on_an_ascend_the_package_beside_it_is_named_too() -> None:
    log = f"lmdeploy serve api_server m --device ascend\n{LMDEPLOY}IndexError: list index\n"
    assert any("dlinfer-ascend" in step for step in some(explain(log).others).tried)


@pytest.mark.parametrize(
    ("path", "named"),
    [("/v/site-packages/tilelang/x.py", "tilelang"), ("/v/site-packages/peft/x.py", "peft 0.9.1"),
     ("/c/transformers_modules/m/modeling.py", "the checkpoint's own code")],
)  # fmt: skip
def test_another_package_is_named_with_its_release(path: str, named: str) -> None:
    log = f"peft==0.9.1\n{trace('/v/lmdeploy/a.py', path)}AttributeError: 'A' object has no b\n"
    found = explain(log)
    assert message(found) == "package_versions"
    assert named in some(found.others).had[0]
    assert found.what.startswith(f"it failed inside {named}")


def test_a_person_s_own_file_is_nobody_s_fault_that_is_known() -> None:
    found = explain(f"{trace('/v/site-packages/lmdeploy/a.py', '/data/me/x.py')}TypeError: g() x\n")
    assert message(found) == "unknown"


@pytest.mark.parametrize(
    "log",
    [
        f"NPROC_PER_NODE=1 swift sft --model_type qwen2-vl-7b-instruct --sft_type lora\n{OUT}",
        f"torchrun --nproc_per_node 2 tools/train_dpo.py --x 1\n{OUT}",
        trace("/v/accelerate/accelerator.py").replace("g(x)", "loss.backward(**kwargs)") + OUT,
        trace("/v/x.py").replace("g(x)", "self.optimizer.step()") + OUT,
    ],
)
def test_a_training_is_not_explained_as_a_serving(log: str) -> None:
    found = explain(log)
    assert found.kind == "out_of_memory"
    assert found.what == text_of("training")
    assert len(found.changes) == 1
    assert found.would_work is None


def test_a_server_after_a_training_is_a_server() -> None:
    found = explain(f"swift sft --model_type m\nlmdeploy serve api_server internvl3-8b\n{OUT}")
    assert "training" not in found.what


def test_a_worker_s_error_goes_before_ray_s_copy_of_another_one() -> None:
    copy = "ERROR worker.py:438 -- Unhandled error: ray::RayWorkerWrapper.warmup() (pid=2)\n"
    found = explain(f"ZeroDivisionError: division by zero\n{copy}RuntimeError: no kernel\n")
    assert "ZeroDivisionError" in found.what
