"""A line that started LMDeploy's server, as `turbofit serve` and the commands that plan read it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from tests.support.plans import plausible_plan
from turbofit.cli.commands.serve import serve
from turbofit.cli.main import TURBOFIT, main
from turbofit.cli.terminal.output import Form, say_open
from turbofit.core.plan import Plan
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.access import Hosts, Origins
from turbofit.gateway.http.refusals import Refusal
from turbofit.serving.run import Run

Out = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]


def ran(capsys: Out, line: str, *more: str) -> tuple[int, str, str]:
    code = main([*line.split(), *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lmdeploy serve api_server internvl2-8b --server-name 127.0.0.1 --server-port 7001 --tp 2",
         "--server-name as --host; --server-port as --port"),
        ("python -m lmdeploy serve api_server internvl2-8b --log-level ERROR --max_batch_size 4",
         "--log-level for the engine"),
        ("internvl2-8b --max-concurrent-requests 4 --backend turbomind --session-len 8192",
         "--backend as --engine"),
        ("--vision-max-batch-size 8 --device cuda internvl2-8b --cache-max 0.5",
         "--vision-max-batch-size left out: LMDeploy 0.18 reads it nowhere; "
         "--device cuda left out: LMDeploy's own default"),
    ],
)  # fmt: skip
def test_a_line_reaches_a_plan(line: str, said: str, capsys: Out) -> None:
    code, out, err = ran(capsys, f"serve {line}", "--on", "2xrtx3090", "--dry-run", "--json")
    assert code == 0
    assert f"as LMDeploy's: {said}" in err.splitlines()
    settings = Plan.from_json(out).engines[0].settings
    assert ("4" in line) is (settings.max_batch_size == 4) or "max_batch" not in line


@pytest.mark.parametrize(
    ("line", "code", "cause"),
    [
        # A plan's own refusal,
        ("lmdeploy serve api_server internvl2-26b --server-port 7001", 3, "free"),
        ("lmdeploy serve api_server Org/No-Such-Model --log-level INFO", 2, "cannot be reached"),
        # or what turbofit refuses, with the way.
        ("lmdeploy serve api_server internvl2-8b --ep 8 --dp 8 --role Decode", 2, "--ep 8: "),
        (
            "lmdeploy serve api_server internvl2-8b --speculative-algorithm eagle3",
            2,
            "for LlamaForCausalLM",
        ),
        ("lmdeploy serve api_server internvl2-8b --device maca", 2, "CUDA GPUs alone"),
        ("lmdeploy serve api_server internvl2-8b --kernel-block-size 32", 2, "no such cache"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "plan"])
def test_or_one_refusal(command, line, code, cause, monkeypatch, capsys: Out) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    on = ["--on", "1xrtx3060", *(["--dry-run"] if command == "serve" else [])]
    assert ran(capsys, f"{command} {line}", *on)[0] == code
    main([command, *line.split(), *on])
    captured = capsys.readouterr()
    if code == 2:
        error, hint = captured.err.splitlines()[-2:]
        assert cause in error
        assert hint.startswith("hint: ")


def test_a_server_of_lmdeploy_is_asked_for_as_one(monkeypatch, capsys: Out) -> None:
    """The gateway gets clients' options, the engine its own, and a pasted text is read."""
    asked = []
    monkeypatch.setattr(Run, "__init__", lambda _, config, *__, **___: asked.append(config))
    monkeypatch.setattr(Run, "prepare", lambda _: 1 / 0)
    line = (
        "lmdeploy serve api_server internvl2-8b --server-name 0.0.0.0 --server-port 7001 "
        "--api-keys one two --max-concurrent-requests 4 --model-name mine --allow-origins * "
        "--tool-call-parser internlm --trust-remote-code --disable-fastapi-docs"
    )
    main(["serve", line, "--pretend", "--on", "1xrtx3090"])
    (config,) = asked
    gateway = config.gateway
    assert (gateway.host, gateway.port, gateway.max_concurrent_requests) == ("0.0.0.0", 7001, 4)
    assert (gateway.api_key, gateway.allow_origins) == (("one", "two"), ("*",))
    assert config.options == ("--tool-call-parser", "internlm", "--trust-remote-code")
    assert (config.model_name, config.request.model) == ("mine", "internvl2-8b")
    assert "--disable-fastapi-docs left out: they are always off" in capsys.readouterr().err


def asked_of(line: str, monkeypatch: pytest.MonkeyPatch) -> list[GatewayConfig]:
    """The gateways that a line would open, before anything is planned."""
    asked: list[GatewayConfig] = []
    monkeypatch.setattr(Run, "__init__", lambda _, config, *__, **___: asked.append(config.gateway))
    monkeypatch.setattr(Run, "prepare", lambda _: 1 / 0)
    main([*line.split(), "--pretend", "--on", "1xrtx3090"])
    return asked


IN_PLACE = "serve api_server internvl2-8b --server-name 0.0.0.0"


@pytest.mark.parametrize("line", [IN_PLACE, IN_PLACE.replace("api", "lmdeploy serve api")])
def test_lmdeploys_own_word_opens_a_server_as_lmdeploy_does(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    (gateway,) = asked_of(line, monkeypatch)
    assert (gateway.host, gateway.api_key, gateway.allowed_media_domains) == ("0.0.0.0", (), ())
    (warning,) = [it for it in capsys.readouterr().err.splitlines() if it.startswith("warning")]
    assert "everybody who reaches 0.0.0.0 may use this server, as with LMDeploy" in warning
    assert "it refuses pictures by address and web pages of others" in warning
    assert "https" not in warning


def test_pages_of_others_do_not_get_into_a_server_that_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (config,) = asked_of(IN_PLACE, monkeypatch)
    hosts = Hosts(config)
    origins = Origins(config.allow_origins, hosts)
    for host in (b"10.0.0.7:23333", b"gpu.example:23333"):
        hosts.check({b"host": host})
        with pytest.raises(Refusal, match="may not use this server"):
            origins.check({b"host": host, b"origin": b"https://evil.example"})
        with pytest.raises(Refusal):
            origins.check({b"host": host, b"origin": b"null"})
    rebound = {b"host": b"evil.example:23333", b"origin": b"http://evil.example:23333"}
    with pytest.raises(Refusal):
        origins.check(rebound)


def test_keys_close_it_and_pictures_may_come_by_address_then(
    monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    (gateway,) = asked_of(f"{IN_PLACE} --api-keys one", monkeypatch)
    assert (gateway.api_key, gateway.allowed_media_domains) == (("one",), ("*",))
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "keys and prompts cross the network in clear" in said


@pytest.mark.parametrize(
    "line",
    [
        "serve internvl2-8b --host 0.0.0.0",
        "serve internvl2-8b --server-name 0.0.0.0",
        "serve api_server internvl2-8b --host 0.0.0.0",
    ],
)
def test_turbofits_own_form_keeps_its_rule(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    assert asked_of(line, monkeypatch) == []
    assert "is reachable from other machines and no key is set" in capsys.readouterr().err


HERE = "ready, on this machine only: LMDeploy would listen on every address (--server-name 0.0.0.0)"


@pytest.mark.parametrize(
    ("words", "last"),
    [
        ("api_server m", HERE), ("lmdeploy serve api_server m", HERE),
        ("api_server m --server-name 127.0.0.1", "ready at"), ("m", "ready at"),
        ("api_server m --host ::1", "ready at"),
    ],
)  # fmt: skip
def test_a_start_in_place_says_last_where_only_this_machine_is_served(
    words: str, last: str, capsys: Out
) -> None:
    config = SimpleNamespace(gateway=GatewayConfig(), api_key=())
    with serve.make_context("serve", words.split(), parent=click.Context(TURBOFIT)):
        say_open(["http://127.0.0.1:1"], config, "m", Form())
    assert capsys.readouterr().err.splitlines()[-1].startswith(last)


def test_what_changes_no_memory_does_not_stop_a_plan(capsys: Out) -> None:
    line = "lmdeploy serve api_server internvl2-8b --tp 2 --server-port 7001 --chat-template x"
    for command in ("plan", "predict"):
        code, out, err = ran(capsys, f"{command} {line}", "--on", "2xrtx4090", "--json")
        assert (code, Plan.from_json(out).tp) == (0, 2)
        said = "as LMDeploy's: --server-port, --chat-template without effect on the plan"
        assert said in err.splitlines()
        assert ran(capsys, f"{command} {line} -q", "--on", "2xrtx4090", "--json")[2] == ""


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ["/v1, model m", "http://127.0.0.1:1, which"]),
        ({"front_keys": ("k",)}, []),  # a node: no client's key is taken
        (
            {"front_keys": ("k",), "api_key": ("c",)},
            ["/v1, model m, with a key", "http://127.0.0.1:1, which"],
        ),
        (
            {"host": "0.0.0.0"},
            ["/v1, model m", "http://127.0.0.1:1 and at every other address of this machine, "],
        ),
    ],
)
def test_it_says_how_to_ask_where_clients_may(keys, words, capsys: Out) -> None:
    config = SimpleNamespace(gateway=GatewayConfig(**keys), api_key=())
    say_open(["http://127.0.0.1:1"], config, "m", Form())
    captured = capsys.readouterr()
    assert captured.out == "http://127.0.0.1:1\n"
    said = captured.err.splitlines()
    heads = ["to ask: turbofit chat http://127.0.0.1:1, or OpenAI's API at ", "ready at "]
    for line, head, word in zip(said, heads[: len(words)], words, strict=True):
        assert line.startswith(head)
        assert word in line


def test_dry_run_prints_what_would_be_launched(capsys: Out) -> None:
    words = ["serve", "internvl2-8b", "--on", "4xrtx3090", "--tp", "4", "--dry-run"]
    words = [*words, "--quant-policy", "8"]
    assert main([*words, "--port", "9000", "--", "--max-log-len", "9"]) == 0
    text = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in text
    for option in ("--server-port 9000", "--quant-policy 8", "--max-log-len 9"):
        assert option in text
    assert main([*words, "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).engines[0].command.argv[0] == "lmdeploy"
    assert main(["serve", "internvl2-26b", "--on", "1xrtx3060", "--dry-run"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant-policy", "4", "--", "--quant-policy", "8"], "is set by turbofit"),
        (["--port", "65535", "--replicas", "2", "--tp", "1"], "65535 is the last port"),
        (["--port", "70000"], "65535 or less"),
    ],
)
def test_serve_refuses(words: list[str], message: str, capsys: Out) -> None:
    assert main(["serve", "internvl2-8b", "--on", "2xrtx3090", "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("m --cluster slurm --on 4xl4 --dry-run", "write ray, or ray:HOST:6379"),
        ("m --cluster ray:h --on 4xl4", "turbofit plan m --cluster ray:h shows"),
        ("--cluster ray:h --dry-run", "turbofit plan MODEL --cluster ray:h shows"),
        ("--cluster ray:h", "turbofit serve MODEL --cluster ray:h"),
    ],
)
def test_a_cluster_is_checked_before_what_stands_beside_it(
    line: str, hint: str, capsys: Out
) -> None:
    code, _, told = ran(capsys, f"serve {line}")
    assert code == 2
    assert hint in told.splitlines()[1]


def test_a_saved_plan_takes_nothing_beside_it_and_has_to_fit(tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plausible_plan().to_json())
    base = ["serve", "--plan", str(path), "--dry-run"]
    assert (main(base), main([*base, "--tp", "2"])) == (0, 2)
    assert (main(["serve", "model", *base[1:]]), main([*base, "--quant-policy", "8"])) == (2, 2)
    assert "--plan and --quant-policy do not go together" in capsys.readouterr().err
    path.write_text(plausible_plan(fits=False).to_json())
    assert main(["serve", "--plan", str(path)]) == 3
    told = capsys.readouterr().err
    assert "GPU 0 lacks 1.9 GiB" in told
    assert "--quant-policy 8: 1.94 times the tokens" in told
