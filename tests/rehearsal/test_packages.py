"""What an engine's rehearsal or server needs, said before all else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from turbofit.cli.main import main
from turbofit.core.errors import PackageError
from turbofit.rehearsal import packages

Patch = pytest.MonkeyPatch


def without_cuda(monkeypatch: Patch, *missing: str) -> None:
    """Let torch be a CPU build, and these packages be missing."""
    monkeypatch.setattr(packages, "cuda_site", lambda: None)
    there = SimpleNamespace(origin=None)
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if name in missing else there
    )


SCRIPT = "scripts/without-gpu --pytorch makes an environment: "


def test_torch_without_cuda_is_said_in_one_line(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_cuda(monkeypatch)
    assert main(["rehearse", "qwen2-vl-2b", "--engine", "pytorch", "--on", "1xrtx3090"]) == 7
    cause, hint = capsys.readouterr().err.splitlines()[-2:]
    lacks = "LMDeploy's PyTorch engine on pretend GPUs needs packages that this environment lacks: "
    assert cause == f"error: {lacks}a CUDA build of torch"
    assert SCRIPT in hint
    # All that is missing is named at once; what pip alone can add, by pip.
    without_cuda(monkeypatch, "torch", "triton")
    with pytest.raises(PackageError, match="lacks: a CUDA build of torch, triton\nhint"):
        packages.need_packages("pytorch")
    without_cuda(monkeypatch, "ray")
    monkeypatch.setattr(packages, "cuda_site", Path)
    with pytest.raises(PackageError, match="lacks: ray\nhint") as found:
        packages.need_packages("pytorch", ray=True)
    assert found.value.hint == "pip install ray"


@pytest.mark.parametrize("more", [[], ["--idle", "600"], ["--quiet"]])
def test_a_server_on_pretend_gpus_says_first_what_its_engine_lacks(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    without_cuda(monkeypatch, "triton")
    words = ["serve", "llava-1.5-7b", "--on", "1xl4:free=19GiB", "--pretend", "--port", "0", *more]
    assert main(words) == 7
    out, err = capsys.readouterr()
    cause, hint = err.splitlines()
    assert (out, cause.partition(": ")[0]) == ("", "error")
    assert "LMDeploy's PyTorch engine" in cause
    assert SCRIPT in hint
    assert "GB" in hint
