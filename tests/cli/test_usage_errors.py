"""Words of other programs at every command: taken, or answered in two lines."""

from __future__ import annotations

import os
import re
from operator import attrgetter
from pathlib import Path

import pytest

import turbofit
from turbofit.cli.main import main
from turbofit.cli.manual import COMMANDS
from turbofit.core.errors import NoGpuError, UsageError
from turbofit.core.plan import Plan
from turbofit.machine import nvml_machine

Out = pytest.CaptureFixture[str]
#: It has no options that a person could mistake.
PLAIN = {"completion"}
#: They read options of other servers as their own.
PLANS = {"calibrate", "export", "plan", "predict", "rehearse", "serve", "tune", "which"}


def refused(capsys: Out, *words: str) -> tuple[str, str]:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--mem-fraction-static 0.5", "SGLang; here: --budget, a share of each card, as 90%"),
        ("--max-prefill 2", "did you mean --max-prefill-token-num?"),
        ("--foo 2", "see turbofit plan --help"),
        ("--imags 2", "did you mean --images?"),
        ("--max-prefil 2", "did you mean --max-prefill-token-num?"),
        ("--limit-mm-per-prompt=4", "here: --images"),
        ("-tp 2", "did you mean --tp?"),
        (
            "--tensor-parallel 2",
            "did you mean --tensor-parallel-size? an option of vLLM; here: --tp",
        ),
        (
            "--tensor_paralel 2",
            "did you mean --tensor-parallel-size? an option of vLLM; here: --tp",
        ),
        ("--max_batchsize 2", "did you mean --max-batch-size?"),
        ("--max-modellen 8192", "here: --context"),
    ],
)
def test_options_of_others_at_plan(words: str, hint: str, capsys: Out) -> None:
    said = refused(capsys, "plan", "internvl2-8b", "--on", "2xrtx3090", *words.split())
    assert said[0] == f"unknown option {re.split('[ =]', words)[0]}"
    assert hint in said[1]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("gateway --server-port 80", "it is LMDeploy's; here: --port"),
        (
            "stop --sever-port 80",
            "did you mean --server-port? it is LMDeploy's; here: turbofit serve",
        ),
        ("serve internvl2-8b --server-prt 80", "it is LMDeploy's; here: --port"),
        ("serve internvl2-8b --tensor-paralel-size 2", "an option of vLLM; here: --tp"),
        ("stop --server-port 80", "it is LMDeploy's; here: turbofit serve MODEL --server-port"),
        ("models --on 1xt4", "turbofit plan, predict, rehearse have it"),
    ],
)
def test_what_stands_elsewhere(words: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, *words.split())[1]


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("export k8s m --port abc", "--port 'abc': it should be a whole number", "export --help"),
        ("export k8s m --port 70000", "65535 or less", "export --help"),
        ("quantize m --calib-samples 0", "'0': it should be a whole number, 1 or more", "--help"),
        ("export docker-compose", "'docker-compose'", "turbofit export compose MODEL"),
        ("export k8s", "PLAN is missing", "turbofit export k8s plan.json"),
        ("export gpustack", "PLAN is missing", "turbofit export gpustack internvl2-8b"),
        ("export", "KIND is missing", "turbofit export systemd plan.json"),
        ("export k8s --plan p.json", "unknown option --plan", "turbofit export KIND PLAN"),
        ("batch --output a.jsonl", "unknown option --output", "turbofit batch INPUT OUTPUT"),
        ("chat --url http://h", "unknown option --url", "turbofit chat URL"),
        ("batch a b c --model m", "unexpected extra argument", "see turbofit batch --help"),
        ("report last", "cannot be read", "did you mean latest?"),
    ],
)
def test_a_wrong_value_and_a_missing_word(words: str, error: str, hint: str, capsys: Out) -> None:
    told = refused(capsys, *words.split())
    assert error in told[0]
    assert hint in told[1]


def test_options_of_the_server_that_a_batch_starts(capsys: Out) -> None:
    error, hint = refused(capsys, "batch", "in", "out", "--pretend", "--on", "1xl4", "--tp", "2")
    assert error == "unknown options --pretend, --on, --tp"
    assert ("--model MODEL -- --pretend --on 1xl4" in hint, hint.count("--url")) == (True, 1)


def test_all_unknown_options_are_named_at_once(capsys: Out) -> None:
    words = "stop m --tensor-parallel-size=4 --foo --bar"
    error, hint = refused(capsys, *words.split())
    assert error == "unknown options --tensor-parallel-size, --foo, --bar"
    assert "here: --tp; --foo, --bar: its options are --all, --wait" in hint


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--tp", "--tp N: GPUs of one engine; see"),
        ("--json=1", "--json: one JSON document on stdout; see"),
        ("--no-queue-images=1", "--no-queue-images: image requests wait"),
        ("--help=1", "--help: this page; see"),
    ],
)
def test_an_option_without_its_value_or_with_one_too_many(
    words: str, hint: str, capsys: Out
) -> None:
    assert refused(capsys, "plan", "internvl2-8b", *words.split())[1].startswith(hint)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - PLAIN - PLANS))
def test_every_command_knows_the_names_of_others(command: str, capsys: Out) -> None:
    error, hint = refused(capsys, command, "--max-model-len", "8192")
    assert error == "unknown option --max-model-len"
    assert "--context" in hint


@pytest.mark.parametrize(
    ("words", "note", "field", "value"),
    [
        ("--backend=pytorch", "LMDeploy's: --backend as --engine", "backend.name", "pytorch"),
        ("--max_model_len 4416", "read: --max_model_len as --context", "promise.context", 4416),
        ("--gpu-memory-utilization 0.90", "as --budget", "tp", 1),
        ("--port 80", "read: --port without effect on the plan", "tp", 1),
        ("--api-keys x --max_batch_size 2", "LMDeploy's: --api-keys without effect on the plan",
         "requests_at_once", 4),
    ],
)  # fmt: skip
def test_what_is_equal_is_taken_and_said(words, note: str, field: str, value, capsys) -> None:
    assert main(["plan", "internvl2-8b", "--on", "2xrtx3090", "--json", *words.split()]) == 0
    captured = capsys.readouterr()
    assert attrgetter(field)(Plan.from_json(captured.out)) == value
    assert note in captured.err


@pytest.mark.parametrize(
    ("line", "options", "note", "gpus"),
    [
        ("CUDA_VISIBLE_DEVICES=2 lmdeploy serve api_server internvl2-8b", "",
         "CUDA_VISIBLE_DEVICES=2 of the line is taken as --gpus 2", (2,)),
        ("export CUDA_VISIBLE_DEVICES=2; lmdeploy serve api_server internvl2-8b", "--gpus 1",
         "left out: other words before lmdeploy serve api_server", (1,)),
        ("CUDA_VISIBLE_DEVICES=2 lmdeploy serve api_server internvl2-8b", "--gpus 1",
         "CUDA_VISIBLE_DEVICES=2 of the line is left out: --gpus is given", (1,)),
        ("docker run --env=A_KEY=abcdef http://me@x lmdeploy serve api_server internvl2-8b",
         "--gpus=0", "left out: other words before", (0,)),
    ],
)  # fmt: skip
def test_what_stands_around_a_pasted_line_is_said(line, options, note, gpus, capsys) -> None:
    assert main(["plan", line, "--on", "3x3090", "--json", *options.split()]) == 0
    captured = capsys.readouterr()
    assert note in captured.err
    assert "abcdef" not in captured.err
    assert Plan.from_json(captured.out).machine.visible == gpus


def test_a_lines_gpus_of_a_measured_machine_stay_a_variable(monkeypatch, capsys: Out) -> None:
    def measure(*_: object) -> None:
        raise NoGpuError(f"of {os.environ['CUDA_VISIBLE_DEVICES']}", hint="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(nvml_machine, "measure_in_time", measure)
    assert main(["plan", "CUDA_VISIBLE_DEVICES=0 lmdeploy serve api_server internvl2-8b"]) == 4
    assert "error: of 0" in capsys.readouterr().err


def test_a_value_is_no_option(capsys: Out) -> None:
    """What follows an option is its value, but for another option; and the model is no value."""
    assert "needs a value before" in refused(capsys, "plan", "m", "--on", "--md")[0]
    assert refused(capsys, "stop", "--max-model-len", "--tp")[0].endswith("--max-model-len, --tp")
    error, hint = refused(capsys, "serve", "m", "--", "--max-model-len", "8192")
    assert "is no option of LMDeploy" in error
    assert hint == "an option of vLLM; here: --context before --"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("lmdeploy serve api_server internvl2-8b", "turbofit serve api_server MODEL"),
        ("vllm serve M --tensor-parallel-size 2", "turbofit serve MODEL"),
        ("start M", "turbofit serve MODEL"),
        ("pull M", "turbofit serve MODEL loads what is missing"),
        ("help plan", "turbofit COMMAND --help"),
        ("sreve internvl2-8b --tp 2", "did you mean serve?"),
        ("internvl3-8b", "it is a model: turbofit plan internvl3-8b"),
        ("https://huggingface.co/OpenGVLab/InternVL3-8B", "it is a model"),
        ("4xrtx3090", "it is a machine: turbofit plan MODEL --on 4xrtx3090"),
        (__file__, "it is a path"),
        ("qqqqqq", "turbofit --help lists the commands"),
        ("--on t4 plan internvl2-8b", "write turbofit plan OPTIONS"),
        ("A=2 serve internvl2-8b", "a variable stands before turbofit: A=2 turbofit serve"),
    ],
)
def test_a_first_word_that_is_no_command(words: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, *words.split())[1]


def test_dashes_that_keyboards_join_begin_an_option(capsys: Out) -> None:
    assert refused(capsys, "which", "m", "\u2014nonsense", "4")[0] == "unknown option --nonsense"
    for dashes in ("\u2014", "\u2014-", "\u2013", "\uff0d\uff0d"):
        words = ["plan", "internvl2-2b", "--on", "3090", f"{dashes}images", "3", "--json"]
        assert main(words) == 0
        assert Plan.from_json(capsys.readouterr().out).promise.images == 3
    assert refused(capsys, "which", "m", "\u2013z")[0] == "unknown option -z"


def test_a_flag_that_is_abbreviated_takes_no_value(capsys: Out) -> None:
    assert refused(capsys, "plan", "m", "--lang", "zh")[0] == "unknown option --lang"


def test_what_keyboards_leave_is_read(capsys: Out) -> None:
    assert (
        main(["plan", "--json", "\uff29nternvl\uff12\uff0d8b", "--on", "\u201c2x 3090\u201d"]) == 0
    )
    plan = Plan.from_json(capsys.readouterr().out)
    assert plan.model.name == "InternVL2-8B"
    assert [gpu.name for gpu in plan.machine.gpus] == ["NVIDIA GeForce RTX 3090"] * 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("plan internvl2-8b --on 3090 --on t4", "--on A+B"),
        ("plan internvl2-8b --gpu 3090", "here: --on, as --on rtx3090"),
        ("plan internvl2-8b --gpus 3090", "--on 3090 is a machine with this card"),
        ("plan internvl2-8b --device 3090", "a card by its name is --on NAME"),
        ("plan internvl2-8b --image 4", "here: --images"),
        ("chat --image a.png", "a picture is its path in the message"),
        ("bench --time 10s", "here: --seconds"),
        ("serve internvl2-8b --daemon", "here: --detach"),
        ("serve internvl2-8b --users 4", "here: --concurrency"),
        ("serve internvl2-8b --lora x", "turbofit merge BASE ADAPTER OUT"),
        ("chat what photo.jpg", "chat asks for the message, in which a picture is its path"),
        ("gateway http://127.0.0.1:23334", "an engine's address is --upstream URL"),
        ("export docker", "turbofit export compose MODEL"),
        ("plan vllm chat internvl2-8b", "turbofit plan vllm serve MODEL"),
        ("plan ollama run qwen2.5vl:7b", "LMDeploy reads no GGUF"),
        ("export m --format compose", "turbofit export compose MODEL"),
        ("export compose m --out a.yaml", "> FILE behind the command"),
        ("serve -d --plan -", "save the plan first"),
        ("plan internvl2-8b --on 2x RTX 3090", "put several words in quotes"),
        ("chat -", "write it as http://127.0.0.1"),
        ("plan qwen", "`turbofit models qwen`"),
        ("bench http://x --rate abc", "whatever is answered: an open loop (Poisson)"),
        ("plan internvl2-8b --images 1920x1080", "--image-size is their size"),
        ("serve internvl2-8b --ep 4", "leave it out, or take the risk with turbofit serve"),
        ("predict internvl2-8b --on t4 --cp 2", "leave it out, or take the risk"),
        ("serve internvl2-8b -- --api-keys x", "give --api-keys before --, or use --no-gateway"),
        ("predict m --lmdeploy-version 0.6.0", "did you mean --lmdeploy?"),
        ("report plan.json --html", "--html FILE: one page; - for stdout"),
        ("chat gpt-4o", "write it as http://127.0.0.1:23333"),
        ("gateway --upstream http://x:1", "--plan FILE is what turbofit plan MODEL --json"),
        ("plan internvl2-8b --on t4 --tp 0 --images -1", "--tp: GPUs of one engine"),
        ("bench http://x --prompt-token 5", "did you mean --prompt-tokens?"),
        ("plan internvl2-8b --on t4 --replicas 2", "a machine of 2 GPUs, as --on 2xrtx3090"),
        ("plan internvl2-8b --on t4 --model-format awq", "InternVL2-8B-AWQ, its 4 bits"),
        ("diagnose Serverlog", "name a log file"),
        ("plan internvl2-8b --on 4xrtx3090,nvlink", "nvlink=0-1+2-3"),
        ("plan ./plan.json", "turbofit serve --plan FILE"),
        ("export systemd turbofit.yaml", "is -f FILE"),
        ("pretend --on 1xl4 nvidia-smi", "write the command after --: -- nvidia-smi"),
        ("serve internvl2-8b -- --html 3", "leave it out, or take the risk with --unplanned"),
        ("plan internvl2-8b qwen2-vl-7b", "turbofit gateway --models NAME=URL"),
    ],
)
def test_a_value_of_another_option_or_argument(words: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, *words.split())[1]


def test_a_quoted_line_of_another_program_is_no_model(capsys: Out) -> None:
    error, hint = refused(capsys, "plan", "llama-server -m qwen2.5-vl-7b.gguf -ngl 99")
    assert error == "'llama-server' begins a line of another program"
    assert "reads no GGUF" in hint


def test_words_that_are_missing_or_too_many(capsys: Out) -> None:
    error, hint = refused(capsys, "plan")
    assert error == "MODEL is missing"
    assert hint.startswith("for example: turbofit plan internvl2-8b")
    of_heads = refused(capsys, "plan", "internvl3-8b", "--on", "4xrtx3090", "--tp", "8")
    assert of_heads[1] == "let turbofit choose --tp and --replicas"  # eight cards change nothing
    assert "--on 4xrtx3090" in refused(capsys, "predict", "internvl2-8b", "4xrtx3090")[1]
    assert "--on 4xrtx3090" in refused(capsys, "plan", "internvl2-8b", "4xrtx3090")[1]
    assert refused(capsys, "report", "internvl2-8b") == (
        "internvl2-8b cannot be read: No such file or directory",
        "write a plan with turbofit plan internvl2-8b --json > plan.json",
    )


def test_files_and_keywords_have_the_same_answer(tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("model: internvl2-8b\nmax_model_len: 8192\n")
    error, hint = refused(capsys, "plan", "-f", str(file))
    assert error.endswith(": max_model_len is no option of plan or serve")
    assert hint == "an option of vLLM; here: context"
    with pytest.raises(UsageError) as caught:
        turbofit.plan("internvl2-8b", on="1xrtx3090", tensor_parallel_size=2)
    assert caught.value.hint == "an option of vLLM; here: tp"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise NoGpuError("NVML cannot be opened", hint="describe a machine with --on SPEC")

    monkeypatch.setattr(nvml_machine, "measure_in_time", nothing)


@pytest.mark.parametrize("command", ["serve", "tune", "calibrate"])
def test_where_no_gpu_is_a_launch_says_what_can_be_done_here(command, no_gpu, capsys) -> None:
    """And nobody is sent from one hint to the next: what a hint says to add is taken."""
    assert main([command, "internvl2-8b"]) == 4
    hint = capsys.readouterr().err.splitlines()[-1]
    assert "--pretend --on 1xrtx3090 runs on pretend GPUs" in hint
    assert "turbofit plan MODEL --on SPEC" in hint
    error, hint = refused(capsys, command, "internvl2-8b", "--on", "1xrtx3090")
    assert "--on names another machine" in error
    assert "--pretend" in hint
    assert "turbofit plan MODEL --on 1xrtx3090" in hint


def test_where_no_gpu_is_others_describe_one(no_gpu: None, tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("model: internvl2-8b\non: 4xrtx3090\n")
    assert main(["serve", "-f", str(file)]) == 2
    assert f"(--on is from {file})" in capsys.readouterr().err
    assert main(["serve", "-f", str(file), "--dry-run"]) == 0
    assert main(["plan", "internvl2-8b"]) == 4
    assert "hint: describe a machine with --on SPEC" in capsys.readouterr().err
    main(["doctor"])
    text = capsys.readouterr().out
    # Without LMDeploy that is a second one.
    assert re.match(r"no GPU that can be read\n(?:1 stops|2 stop) serving, ", text)
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  fix  "))
    assert lines[at + 1].startswith("       ")


def test_a_secret_before_the_command_is_not_repeated(capsys: Out) -> None:
    for words in (["HF_TOKEN=hf_x", "serve", "internvl2-8b"], ["--api-key=hf_x", "serve"]):
        assert "hf_x" not in "".join(refused(capsys, *words))
