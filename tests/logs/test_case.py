"""Cards, models and releases that a log or its user names, as a machine, a model and an account."""

from __future__ import annotations

import pytest

from tests.logs.conftest import explain
from tests.logs.test_explain import COMMAND, LOADING, OUT
from turbofit.core.errors import UsageError
from turbofit.memory.account import TEMPORARIES
from turbofit.planning.plan import predict
from turbofit.planning.request import PredictRequest

SMI = """
| NVIDIA-SMI 550.54.14    Driver Version: 550.54.14      CUDA Version: 12.4     |
|=========================================+======================+==============|
|   0  NVIDIA GeForce RTX 3090        On  | 00000000:01:00.0 Off |          N/A |
| 30%   40C    P8             20W /  350W |  20100MiB /  24576MiB|   0% Default |
|   1  NVIDIA GeForce RTX 3090        On  | 00000000:02:00.0 Off |          N/A |
| 30%   40C    P8             20W /  350W |      1MiB /  24576MiB|   0% Default |
| Processes:                                                                     |
|    0   N/A  N/A      4711      C   python3                           18000MiB |
"""


def test_the_machine_as_nvidia_smi_shows_it() -> None:
    assert explain(SMI).read.machine == "2xrtx3090"
    assert explain(f"{SMI}\nInternVL2-8B?\n").would_work is not None
    query = explain("0, NVIDIA L4, 500 MiB, 23034 MiB\n1, NVIDIA L4, 2 MiB, 23034 MiB\n")
    assert query.read.machine == "2xl4"
    listed = "GPU 0: NVIDIA GeForce RTX 3090 (UUID: G)\nGPU 1: NVIDIA GeForce RTX 4090 (UUID: G)"
    assert explain(f"{listed}\nMemoryError\n").read.machine == "1xrtx3090+1xrtx4090"


def test_the_user_goes_before_the_log() -> None:
    text = f"{COMMAND}No valid 2x RTX 3090\ntorch.OutOfMemoryError: CUDA out of memory.\n"
    found = explain(text, model="qwen2-vl-2b", on="1xl4")
    assert (found.read.model, found.read.machine) == ("Qwen2-VL-2B-Instruct", "1xl4")
    with pytest.raises(UsageError):
        explain(text, model="no-such-model-at-all")
    with pytest.raises(UsageError):
        explain(text, on="9xnothing")


LOG = """\
pip install lmdeploy=={version}
>>> pipeline('OpenGVLab/InternVL2-8B', backend_config=TurbomindEngineConfig(tp=4))  # 4x RTX 3090
[TM][INFO] [BlockManager] block_size = 2 MB
[TM][INFO] [BlockManager] max_block_count = 1112
[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/utils/allocator.h:231
"""


def held(version: str) -> int:
    made = explain(LOG.format(version=version))
    assert made.read.version == version
    return next(one.bytes for one in made.held if "weights" in one.who)


def test_each_version_has_its_own_account() -> None:
    for version in ("0.5.3", "0.6.4", "0.9.2"):
        asked = PredictRequest.of(model="internvl2-8b", on="4xrtx3090", tp=4, lmdeploy=version)
        card = predict(asked).ledgers[0]
        assert held(version) == card.bytes_in("weights") - card.bytes_of(TEMPORARIES)


@pytest.mark.parametrize(
    ("cards", "machine"),
    [
        ("A100 (80 GB) x 2", "2xa100-80g"),
        ("RTX 4090 48G", "1xrtx4090-48g"),
        ("RTX 3090 64GB RAM", "1xrtx3090"),
        ("2x RTX 3090, 48 GB together", "2xrtx3090"),
        ("a server with two RTX 3090", "2xrtx3090"),
        ("on GPU 2 A100 80G", "1xa100-80g"),
        ("RTX 3080 (20480 MiB)", None),
        ("RTX 4090 Laptop GPU", None),
    ],
)
def test_a_card_has_the_size_that_stands_beside_its_name(cards: str, machine: str | None) -> None:
    found = explain(LOADING.format(cards))
    assert found.read.machine == machine
    assert machine or any("which machine" in one for one in found.unknown)


@pytest.mark.parametrize(
    ("total", "machine"),
    [("39.38", "1xa100-40g"), ("79.15", "1xa100-80g"),
     ("19.50", "1xNVIDIA A100-SXM4-40GB:total=19968MiB")],
)  # fmt: skip
@pytest.mark.parametrize("card", ["an A100", "GPU 0: NVIDIA A100"])
def test_a_card_has_the_size_that_torch_prints(total: str, machine: str, card: str) -> None:
    found = explain(
        f"{card}\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
        f" a total capacity of {total} GiB of which 61.00 MiB is free.\n"
    )
    assert found.read.machine == machine


def test_a_card_without_a_preset_is_named_and_not_dropped() -> None:
    cards = "0: NVIDIA GeForce RTX 5070 Ti 16303MiB\n1: NVIDIA GeForce RTX 5090 D 32607MiB\n"
    found = explain(f"{cards}{OUT}")
    assert found.read.machine is None
    assert any("RTX 5090 D" in one for one in found.unknown)


def test_a_model_is_found_by_the_names_of_presets() -> None:
    command = "lmdeploy serve api_server /models/gpt-oss-120b --tp 4\n"
    assert explain(command + OUT).read.model == "gpt-oss-120b"
