"""The commands that start engines, for each release of LMDeploy, and for Transformers."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.launch.fallback.support import tiny_map, tiny_qwen2_vl
from tests.support.plans import gpu, model, plausible_plan
from turbofit.core.errors import UsageError
from turbofit.core.model import ModelSource
from turbofit.core.plan import Plan, Settings
from turbofit.memory.versions import parse as version_tuple
from turbofit.planning.commands import (
    _releases,
    came_later,
    commands,
    folded,
    model_path,
    ratio,
    read_map,
)


def test_one_command_a_group_on_consecutive_ports() -> None:
    plan = plausible_plan(gpus=4, tp=2)
    first, second = commands(plan, port=9000)
    assert first.argv[:4] == ("lmdeploy", "serve", "api_server", "OpenGVLab/InternVL2-8B")
    assert first.argv[-6:-2] == ("--server-name", "127.0.0.1", "--server-port", "9000")
    assert "9001" in second.argv
    assert (first.group, second.group) == (0, 1)
    assert first.env == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": f"{gpu(0).uuid},{gpu(1).uuid}",
        "TM_LOG_LEVEL": "INFO",
    }
    assert second.env["CUDA_VISIBLE_DEVICES"] == f"{gpu(2).uuid},{gpu(3).uuid}"
    assert "--trust-remote-code" in first.argv
    plain = plausible_plan(model=model(needs_remote_code=False))
    assert "--trust-remote-code" not in plain.commands[0].argv


def test_a_local_checkpoint_keeps_its_name_and_a_revision_is_passed_where_lmdeploy_downloads():
    source = ModelSource(kind="hub_cache", where="cache", sizes="file", checkpoint="/hub/snap")
    argv = plausible_plan(model=model(source=source)).commands[0].argv
    assert argv[3] == "/hub/snap"
    assert argv[argv.index("--model-name") + 1] == "OpenGVLab/InternVL2-8B"
    folder = model(source=source, hub_id=None)
    assert "--model-name" not in plausible_plan(model=folder).commands[0].argv
    assert model_path(model(hub_id=None)) == "internvl2-8b"
    argv = plausible_plan(model=model(revision="v1")).commands[0].argv
    assert argv[argv.index("--revision") + 1] == "v1"
    assert "--revision" not in plausible_plan().commands[0].argv


def test_a_ratio_is_never_rounded() -> None:
    for value, text in ((0.873, "0.873"), (0.8, "0.800"), (0.8125001, "0.8125001")):
        assert ratio(value) == text


@pytest.mark.lmdeploy
@pytest.mark.parametrize(
    "settings",
    [
        Settings(tp=4, cache_max_entry_count=0.873, max_batch_size=8),
        Settings(
            tp=2, dtype="float16", cache_max_entry_count=0.001, max_prefill_token_num=1024,
            max_batch_size=1, session_len=2048, quant_policy=4, cache_block_seq_len=128,
            communicator="cuda-ipc", async_=0, enable_prefix_caching=True, model_format="awq",
            language_model_only=True,
        ),
    ],
)  # fmt: skip
def test_lmdeploy_reads_exactly_the_planned_settings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own command line, with the server replaced by a recorder."""
    import lmdeploy.archs
    import lmdeploy.serve.openai.api_server
    from lmdeploy import TurbomindEngineConfig
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    if "api_server" not in SubCliServe.subparsers.choices:
        SubCliServe.add_parsers()
    plan = plausible_plan(settings=settings)
    args = CLI.parser.parse_args(list(commands(plan, port=8123)[0].argv[1:]))
    given: dict[str, Any] = {}
    monkeypatch.setattr(lmdeploy.archs, "autoget_backend", lambda *_, **__: "turbomind")
    server = sys.modules["lmdeploy.serve.openai.api_server"]
    monkeypatch.setattr(server, "serve", lambda path, **rest: given.update(path=path, **rest))
    args.run(args)
    config = given["backend_config"]
    assert type(config) is TurbomindEngineConfig
    # What is not planned is LMDeploy's own.
    assert vars(config) == {**vars(TurbomindEngineConfig()), **plan.lmdeploy_settings()}
    assert given["path"] == "OpenGVLab/InternVL2-8B"
    assert (given["server_name"], given["server_port"]) == ("127.0.0.1", 8123)
    assert (given["log_level"], given["trust_remote_code"]) == ("WARNING", True)


def test_runs_of_layers_are_folded_and_what_is_no_map_is_refused():
    placed = tiny_map([0, 0, "cpu", 1])
    text = folded(placed)
    assert '"model.language_model.layers.0-1":0' in text
    assert '"model.language_model.layers.2":"cpu"' in text
    assert read_map(text) == placed
    for wrong in ("{", "nowhere.json", '{"m": "gpu"}', '{"m.layers.3-1": 0}', "[" * 9999):
        with pytest.raises(UsageError, match="device map"):
            read_map(wrong)


@pytest.mark.lmdeploy
def test_layers_off_the_device_give_the_same_tokens(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    folder = tiny_qwen2_vl(tmp_path / "Qwen2-VL")
    from transformers import Qwen2VLForConditionalGeneration as Model

    ids = torch.arange(5, 45).reshape(1, -1)

    def tokens(placed):
        scratch = tmp_path / "scratch"
        model = Model.from_pretrained(
            str(folder), device_map=placed, dtype=torch.float32, attn_implementation="sdpa",
            offload_folder=str(scratch),
        ).eval()  # fmt: skip
        assert not list(scratch.glob("*.dat"))  # safetensors are read where they lie
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                             min_new_tokens=12, do_sample=False)  # fmt: skip
        return out[0, 40:].tolist(), model

    whole, _ = tokens({"": "cpu"})
    split, model = tokens(read_map(folded(tiny_map(["cpu", "disk", "disk", "cpu"]))))
    assert split == whole
    assert len(set(whole)) > 1
    assert model.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert model.device.type == "cpu"
    assert json.loads(folded(tiny_map(["cpu"] * 4)))["model.language_model.layers.0-3"] == "cpu"


#: Every option that a command of ours can have, with values that nothing is without.
ALL = Settings(
    communicator="cuda-ipc", enable_prefix_caching=True, model_format="awq",
    language_model_only=True, num_gpu_blocks=100, eager_mode=True,
    cudagraph_capture_batch_sizes=(1, 2), distributed_executor_backend="mp",
)  # fmt: skip


def predicted(version: str, engine: str = "turbomind", **options: object) -> Plan:
    return turbofit.predict(
        "internvl2-8b", on="2xa100-80g", lmdeploy=version, engine=engine, tp=2, **options
    )


def options_of(plan: Plan) -> set[str]:
    return {word for word in plan.commands[0].argv if word.startswith("--")}


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_every_option_of_a_command_has_the_release_that_brought_it(engine):
    plan = predicted("0.18.0", engine)
    releases = _releases()
    for checkpoint in (None, "/models/a"):
        source = replace(plan.model.source, checkpoint=checkpoint)
        model = replace(plan.model, revision="abc", hub_id="a/b", source=source)
        with_all = replace(plan, settings=ALL, model=model)
        assert options_of(replace(plan, commands=commands(with_all))) <= set(releases.options)
    assert {value.split()[0] for value in releases.values} <= set(releases.options)
    # None is newer than the parser that the list was read from.
    for release in releases.options.values():
        assert (0, 0, 14) <= version_tuple(release) <= (0, 18, 0)


@pytest.mark.parametrize(
    ("option", "last_without", "first_with"),
    [
        ("--communicator", "0.7.1", "0.7.2"),
        ("--max-prefill-token-num", "0.5.3", "0.6.0"),
        ("--cache-block-seq-len", "0.2.6", "0.3.0"),
        ("--trust-remote-code", "0.12.3", "0.13.0"),
    ],
)
def test_an_option_stands_in_commands_from_its_release_on(option, last_without, first_with):
    model = "llama-2-7b" if option == "--cache-block-seq-len" else "internvl2-8b"
    without, with_it = (
        turbofit.predict(model, on="1xa100-80g", lmdeploy=version, engine="turbomind")
        for version in (last_without, first_with)
    )
    assert option not in options_of(without)
    assert option in options_of(with_it)
    # A usual value needs no word: the release does so without the option.
    assert not [text for text in without.warnings if option in text]


def test_what_a_release_cannot_be_told_is_said_first_with_the_release_that_can():
    made = predicted("0.5.3", max_prefill_token_num=4096, dtype="float16", async_=0)
    said = made.warnings[0]
    for words in (
        "api_server of LMDeploy 0.5.3 has no", "--max-prefill-token-num 4096 (from 0.6.0 on)",
        "--dtype float16 (from 0.6.1 on)", "--async 0 (from 0.12.0 on)",
    ):  # fmt: skip
        assert words in said
    assert not {"--max-prefill-token-num", "--dtype", "--async"} & options_of(made)
    assert made.settings.max_prefill_token_num == 4096  # what is predicted stays what was asked
    # A value can be newer than its option.
    made = predicted("0.9.2", communicator="cuda-ipc")
    assert "--communicator" not in options_of(made)
    assert "no --communicator cuda-ipc (from 0.10.0 on)" in made.warnings[0]
    assert came_later(("--communicator", "native"), "0.9.2") is None
