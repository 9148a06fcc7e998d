from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest

from tests.support.plans import gpu, model, plausible_plan
from turbofit.core.model import ModelSource
from turbofit.core.plan import Settings
from turbofit.planning.commands import commands, model_path, ratio


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


def test_remote_code_only_where_it_is_needed() -> None:
    assert "--trust-remote-code" in plausible_plan().commands[0].argv
    plain = plausible_plan(model=model(needs_remote_code=False))
    assert "--trust-remote-code" not in plain.commands[0].argv


def test_a_local_checkpoint_keeps_the_name_that_clients_ask_for() -> None:
    source = ModelSource(kind="hub_cache", where="cache", sizes="file", checkpoint="/hub/snap")
    argv = plausible_plan(model=model(source=source)).commands[0].argv
    assert argv[3] == "/hub/snap"
    assert argv[argv.index("--model-name") + 1] == "OpenGVLab/InternVL2-8B"
    folder = model(source=source, hub_id=None)
    assert "--model-name" not in plausible_plan(model=folder).commands[0].argv
    assert model_path(model(hub_id=None)) == "internvl2-8b"


@pytest.mark.parametrize(
    ("value", "text"), [(0.873, "0.873"), (0.8, "0.800"), (0.8125001, "0.8125001")]
)
def test_a_ratio_is_never_rounded(value: float, text: str) -> None:
    assert ratio(value) == text


@pytest.fixture(scope="module")
def parse() -> Any:
    """LMDeploy's own command line, with the server replaced by a recorder."""
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    if "api_server" not in SubCliServe.subparsers.choices:
        SubCliServe.add_parsers()

    def run(argv: tuple[str, ...]) -> Any:
        return CLI.parser.parse_args(list(argv[1:]))

    return run


@pytest.mark.lmdeploy
@pytest.mark.parametrize(
    "settings",
    [
        Settings(tp=4, cache_max_entry_count=0.873, max_batch_size=8),
        Settings(
            tp=2,
            dtype="float16",
            cache_max_entry_count=0.001,
            max_prefill_token_num=1024,
            max_batch_size=1,
            session_len=2048,
            quant_policy=4,
            cache_block_seq_len=128,
            communicator="cuda-ipc",
            async_=0,
            enable_prefix_caching=True,
            model_format="awq",
            language_model_only=True,
        ),
        Settings(quant_policy=8, communicator="native", cache_max_entry_count=0.999),
    ],
)
def test_lmdeploy_reads_exactly_the_planned_settings(
    settings: Settings, parse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmdeploy.archs
    from lmdeploy import TurbomindEngineConfig

    plan = plausible_plan(settings=settings)
    args = parse(commands(plan, port=8123)[0].argv)
    given: dict[str, Any] = {}
    monkeypatch.setattr(lmdeploy.archs, "autoget_backend", lambda *_, **__: "turbomind")
    import lmdeploy.serve.openai.api_server

    server = sys.modules["lmdeploy.serve.openai.api_server"]
    monkeypatch.setattr(server, "serve", lambda path, **rest: given.update(path=path, **rest))
    args.run(args)
    config = given["backend_config"]
    assert type(config) is TurbomindEngineConfig
    planned = plan.lmdeploy_settings()
    assert {name: getattr(config, name) for name in planned} == planned
    untouched = {name for name in vars(config) if name not in planned}
    default = vars(TurbomindEngineConfig())
    assert {name: vars(config)[name] for name in untouched} == {n: default[n] for n in untouched}
    assert given["path"] == "OpenGVLab/InternVL2-8B"
    assert (given["server_name"], given["server_port"]) == ("127.0.0.1", 8123)
    assert given["log_level"] == "WARNING"
    assert given["trust_remote_code"] is True


def test_a_revision_is_passed_where_lmdeploy_downloads() -> None:
    plan = plausible_plan(gpus=1, tp=1)
    asked = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, revision="v1"))
    argv = commands(asked)[0].argv
    assert argv[argv.index("--revision") + 1] == "v1"
    assert "--revision" not in commands(plan)[0].argv
