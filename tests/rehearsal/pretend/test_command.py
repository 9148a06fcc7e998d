"""The environment of a command on a pretend machine."""

from __future__ import annotations

from pathlib import Path

from turbofit.rehearsal.pretend.command import pretend_environment


def test_only_the_child_is_changed() -> None:
    base = {"PATH": "/bin", "LD_LIBRARY_PATH": "/opt", "CUDA_VISIBLE_DEVICES": "1", "TM_X": "1"}
    env = pretend_environment(Path("/lib"), Path("/scenario"), base)
    assert (env["LD_LIBRARY_PATH"], env["TURBOFIT_PRETEND_SCENARIO"]) == ("/lib:/opt", "/scenario")
    assert env["PATH"] == "/bin"
    assert not {"CUDA_VISIBLE_DEVICES", "LD_PRELOAD"} & env.keys()
    assert env["TM_X"] == "1"  # a user's own command keeps what changes memory
    assert "CUDA_VISIBLE_DEVICES" in base


def test_beside_a_cuda_build_of_torch_they_come_first(libraries: Path, tmp_path: Path) -> None:
    base = {"LD_PRELOAD": "/x.so", "PYTHONPATH": "/mine"}
    env = pretend_environment(libraries, Path("/s"), base, site=tmp_path)
    names = [Path(p).name for p in env["LD_PRELOAD"].split()]
    assert names[0] == "libturbofit_pretend.so"
    assert {"libcuda.so.1", "libcudart.so.12", "libnccl.so.2"} < set(names)
    assert names[-1] == "x.so"
    first, second = env["PYTHONPATH"].split(":")
    assert (Path(first) / "sitecustomize.py").exists()
    assert second == "/mine"
