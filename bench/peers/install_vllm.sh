#!/bin/sh
# An environment with vLLM for the bench, without NVIDIA's compute wheels: install_vllm.sh FOLDER
#
# FOLDER becomes a virtual environment of $PYTHON (default: python3, 3.10 to 3.13); give it a place
# outside the repository. 4.2 GB of disk. vLLM, torch and the packages that they pin are installed
# without what they require; then all else that vLLM's own metadata names, less its GPU kernels and
# media. `===` keeps an index's CPU build of torch away.
set -eu
[ $# -eq 1 ] || { echo "usage: install_vllm.sh FOLDER" >&2; exit 2; }
folder=$1
"${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python

"$python" -m pip install --quiet --no-deps \
    vllm==0.32.0 torch===2.13.0 torchvision===0.28.0 triton===3.7.1 \
    xgrammar==0.2.8 compressed-tensors==0.17.0 depyf==0.20.0 apache-tvm-ffi==0.1.11 \
    flashinfer-python==0.7.0.post1 llguidance==1.7.0 loguru==0.7.3 nvtx==0.2.15 \
    nvidia-cuda-nvrtc==13.0.88

# What vLLM requires beside those; pip brings its packaging library along.
"$python" - > "$folder/rest.txt" <<'PYTHON'
import re
from importlib.metadata import PackageNotFoundError, requires, version

from pip._vendor.packaging.requirements import Requirement

#: Kernels, loaders and media that nothing here runs; most of them pull NVIDIA's wheels in.
SKIPPED = {
    "torchaudio", "torchcodec", "pynvvideocodec", "tilelang", "nvidia-cudnn-frontend",
    "fastsafetensors", "instanttensor", "nvidia-cutlass-dsl", "quack-kernels", "tokenspeed-mla",
    "humming-kernels",
}  # fmt: skip


def wanted(line: str) -> bool:
    need = Requirement(line)
    name = re.sub(r"[-_.]+", "-", need.name).lower()
    if name in SKIPPED or (need.marker and not need.marker.evaluate({"extra": ""})):
        return False
    try:
        version(name)
    except PackageNotFoundError:
        return True
    return name == "setuptools"


# torch's, depyf's and flashinfer's own, which --no-deps left out
lines = ["sympy", "networkx", "jinja2", "fsspec", "astor", "dill", "click", "tabulate"]
print("\n".join([*lines, *filter(wanted, requires("vllm") or [])]))
PYTHON
"$python" -m pip install --quiet --requirement "$folder/rest.txt"

# Nothing of that list may have brought compute wheels, or another torch, along.
"$python" - <<'PYTHON'
from importlib.metadata import distributions, version

names = sorted({d.metadata["Name"].lower() for d in distributions()})
print("vllm", version("vllm"), "torch", version("torch"), "transformers", version("transformers"))
print("of NVIDIA:", ", ".join(name for name in names if name.startswith("nvidia")))
PYTHON
