"""Words of other programs at every command: taken, or answered in two lines."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest

import turbofit
from turbofit.cli.command_group import COMMANDS
from turbofit.cli.main import main
from turbofit.cli.usage_errors import mended
from turbofit.core.errors import NoGpuError, UsageError
from turbofit.core.plan import Plan
from turbofit.machine import nvml_machine
from turbofit.planning import which

Out = pytest.CaptureFixture[str]
#: These have no options that a person could mistake.
PLAIN = {"help", "version", "completion"}


def refused(capsys: Out, *words: str) -> tuple[str, str]:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


@pytest.mark.parametrize(
    ("words", "value", "hint"),
    [
        ("--gpu-memory-utilization 0.5", " 0.5", "here: --budget 50%"),
        ("--max-model-len 8192", " 8192", "an option of vLLM; here: --context 8192"),
        ("--port 80", "", "turbofit serve, gateway, export have it"),
        ("--model x/y", " x/y", "here: turbofit plan internvl2-8b x/y --on"),
        ("--foo 2", "", "see turbofit plan --help"),
        ("--enforce-eager", "", "here: --eager-mode"),
        ("-o json", "", "here: --json (--md prints Markdown"),
        ("--hf-token hf_x", " ***", "set HF_TOKEN to it"),
        ("--max-num-batched-tokens 8k", " 8k", "here: --max-prefill-token-num 8k"),
        ("--env HF_TOKEN=hf_x", " HF_TOKEN=***", "NAME=VALUE turbofit"),
    ],
)
def test_options_of_others_at_plan(words: str, value: str, hint: str, capsys: Out) -> None:
    said = refused(capsys, "plan", "internvl2-8b", "--on", "2xrtx3090", *words.split())
    name = words.split(maxsplit=1)[0].partition("=")[0]
    assert said[0] == f"unknown option {name}{value}"
    assert hint in said[1]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("bench --url http://x", "URL stands without an option: turbofit bench [OPTIONS] URL"),
        ("report --run latest", "turbofit report [OPTIONS] PLAN|RUN|latest"),
        ("batch -i a -o b", "INPUT stands without an option: turbofit batch INPUT OUT"),
        ("merge a b -o c", "OUT stands without an option: turbofit merge [OPTIONS] BASE"),
    ],
)
def test_what_stands_without_an_option(words: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, *words.split())[1]


def test_all_unknown_options_are_named_at_once(capsys: Out) -> None:
    words = "stop m --tensor-parallel-size=4 --time 9 --foo --bar"
    error, hint = refused(capsys, *words.split())
    assert error == "unknown options --tensor-parallel-size 4, --time 9, --foo, --bar"
    docker = "--time: an option of docker; here: --wait 9"
    assert f"{docker}; --foo, --bar: its options are --all, --wait" in hint


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


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - PLAIN))
def test_every_command_knows_the_names_of_others(command: str, capsys: Out) -> None:
    error, hint = refused(capsys, command, "--max-model-len", "8192")
    assert error == "unknown option --max-model-len 8192"
    assert "--context 8192" in hint


@pytest.mark.parametrize(
    ("words", "note", "field", "value"),
    [
        ("-tp 2", "-tp of SGLang is taken as --tp", "parallel.tp", 2),
        ("-c 4096", "-c of llama.cpp is taken as --context", "settings.session_len", 4096),
        ("--backend=pytorch", "LMDeploy's: --backend as --engine", "engine.name", "pytorch"),
        (
            "--api-keys x --max_batch_size 2",
            "LMDeploy's: --api-keys without a part in the plan",
            "settings.max_batch_size",
            2,
        ),
    ],
)
def test_what_is_equal_is_taken_and_said(words, note: str, field: str, value, capsys) -> None:
    base = ["internvl2-8b", "--on", "2xrtx3090"]
    assert main(["plan", *base, "--json", *words.split()]) == 0
    captured = capsys.readouterr()
    assert attrgetter(field)(Plan.from_json(captured.out)) == value
    assert note in captured.err
    lmdeploys = ["--server-port", "9000", "--server-name", "127.0.0.1"]
    assert main(["serve", *base, "--dry-run", *lmdeploys]) == 0
    captured = capsys.readouterr()
    assert "--server-port 9000" in captured.out
    said = "as LMDeploy's: --server-port as --port; --server-name as --host"
    assert said in captured.err.splitlines()


def test_a_value_is_no_option(capsys: Out) -> None:
    """What follows an option is its value, whatever it looks like; and the model is no value."""
    assert "needs a value before" in refused(capsys, "plan", "m", "--on", "--max-model-len")[0]
    assert refused(capsys, "serve", "--max-model-len", "--tp", "2")[0].endswith("--max-model-len")
    error, hint = refused(capsys, "serve", "m", "--", "--max-model-len", "8192")
    assert "is no option of LMDeploy" in error
    assert hint == "an option of vLLM; here: --context 8192 before --"
    hint = refused(capsys, "CUDA_VISIBLE_DEVICES=2", "serve", "internvl2-8b", "--tp", "2")[1]
    assert hint == "as CUDA_VISIBLE_DEVICES=2 turbofit serve internvl2-8b --tp 2"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("run", "turbofit serve MODEL"),
        ("ask", "turbofit chat"),
        ("internvl3-8b", "it is a model: turbofit plan internvl3-8b"),
        ("https://huggingface.co/OpenGVLab/InternVL3-8B", "it is a model"),
        ("qwen2.5vl:7b", "it is a model"),
        ("4xrtx3090", "it is a machine: turbofit plan MODEL --on 4xrtx3090"),
        (__file__, "it is a path"),
        ("qqqqqq", "turbofit help lists the commands"),
    ],
)
def test_a_first_word_that_is_no_command(word: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, word)[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["turbofit", "plan", "internvl2-8b", "--md"], "plan internvl2-8b --md"),
        (["internvl2-8b", "plan", "--on", "t4"], "plan internvl2-8b --on t4"),
        (["--on", "t4", "plan", "internvl2-8b"], "plan internvl2-8b --on t4"),
        (["can I run InternVL2-8B on a 4080 super?"], "plan InternVL2-8B --on '4080 super'"),
        (["4090能跑qwen2.5-vl-32b吗"], "plan qwen2.5-vl-32b --on 4090"),
        (["launch_server", "--model-path", "a/b", "--tp-size", "2"], "serve a/b --tp 2"),
        (
            ["docker", "run", "--gpus", "all", "vllm/vllm-openai:latest", "--model", "a/b"],
            "plan a/b --gpus all --json",
        ),
        (["sreve", "internvl2-8b", "--tp", "2"], "serve internvl2-8b --tp 2"),
        (["plna", "internvl2-8b"], "plan internvl2-8b"),
        (["estimate", "internvl2-8b", "--on", "t4"], "plan internvl2-8b --on t4"),
        (["serves", "internvl2-8b", "--api-key", "sk-x"], "serve internvl2-8b --api-key '***'"),
        (["vllm", "internvl2-8b", "--api-key", "sk-x"], "serve internvl2-8b --api-key '***'"),
        (["ollama", "run", "x/Qwen2.5-VL-7B-GGUF"], "serve qwen2.5-vl-7b-awq"),
    ],
)
def test_the_line_that_is_meant_is_named(words: list[str], line: str, capsys: Out) -> None:
    hint = refused(capsys, *words)[1]
    assert f"turbofit {line}" in hint
    assert "sk-x" not in hint


@pytest.mark.parametrize(
    "words",
    [
        "internvl2-8b --on 2x RTX 3090",
        "internvl2-8b --on \u201c2x RTX 3090\u201d",
        "'internvl2-8b' --on '2x RTX 3090'",
        "internvl2-8b \u2014on 3090 3090",
        "internvl2-8b ^ --on 2x3090 ^",
        "internvl2-8b --on 3090 --on 3090 # as it is",
        "\uff29nternvl\uff12\uff0d8b --on \u4e24\u5f203090",
    ],
)
def test_what_other_shells_and_keyboards_leave_is_read(words: str, capsys: Out) -> None:
    assert main(["plan", "--json", *words.split()]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert plan.model.name == "InternVL2-8B"
    assert [gpu.name for gpu in plan.machine.gpus] == ["NVIDIA GeForce RTX 3090"] * 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("plan llava 1.5 7b", "as turbofit plan llava-1.5-7b"),
        ("plan internvl2-8b,internvl2-2b --on t4", "plan internvl2-8b internvl2-2b --on t4"),
        ("plan internvl2-8b --on t4 --eager-mode yes", "plan internvl2-8b --on t4 --eager-mode"),
        ("bench http://x --backend vllm", "leave it out"),
        ("$ turbofit plan", "leave out what stands before the command"),
        ("chat -", "write it as http://127.0.0.1"),
        ("plan qwen", "`turbofit models qwen`"),
        ("serve internvl2 8b", "as turbofit serve internvl2-8b"),
        ("bench http://x --rate abc", "an open loop (Poisson); it may be left out"),
        ("plan internvl2-8b --images 1920x1080", "--image-size is their size"),
        ("plan --on internvl2-8b t4", "as turbofit plan internvl2-8b --on t4"),
        ("plan on 2xt4 internvl2-8b --context 8k", "plan internvl2-8b --on 2xt4 --context 8k"),
        ("serve api_server internvl2-8b --tp-size 2", "an option of SGLang; here: --tp 2"),
        ("serve internvl2-8b --ep 4", "leave it out, or take the risk with turbofit serve"),
        ("predict internvl2-8b --on t4 --cp 2", "leave it out, or take the risk"),
        ("serve internvl2-8b -- --api-keys x", "give --api-keys before --, or use --no-gateway"),
        ("serve whisper-large-v3 --language zh", "vLLM and Transformers run it"),
        ("gpus --vram 24", "turbofit gpus 24gb"),
        ("models --family internvl", "a word filters"),
        ("plan --model internvl2-8b --on t4", "here: turbofit plan internvl2-8b --on t4"),
        ("plan internvl2-8b --load-in-4bit", "as internvl2-8b-awq"),
        ("plan internvl2-8b --on t4 --model-format awq", "InternVL2-8B-AWQ, its 4 bits"),
        ("plan internvl2-8b --on t4 --replicas 2", "a machine of 2 GPUs, as --on 2xrtx3090"),
        ("predict m --lmdeploy-version 0.6.0", "did you mean --lmdeploy?"),
        ("export internvl2-8b --on 1xl4 --k8s", "as turbofit export k8s internvl2-8b --on 1xl4"),
        ("report plan.json --html", "--html FILE: one page; - for stdout"),
        ("chat gpt-4o", "write it as http://127.0.0.1:23333"),
        ("which --on t4 --vision", "turbofit models vl"),
        ("plan internvl2-8b --precision int4", "as internvl2-8b-awq"),
        ("gateway --upstream http://x:1", "add --plan FILE, which turbofit plan MODEL --json"),
        ("compare internvl2-8b --on t4 --on l4", "page --models internvl2-8b --cards t4 l4"),
        ("compare t4 vs l4 internvl2-8b", "page --models internvl2-8b --cards t4 l4"),
        ("merge ./lora internvl2-8b out", "turbofit merge internvl2-8b ./lora out"),
        ("diagnose error.png", "paste the message in quotes"),
        ("plan internvl2-8b --on t4 --tp 0 --images -1", "--tp: GPUs of one engine; it may"),
        ("bench http://x --prompt-token 5", "did you mean --prompt-tokens?"),
        ("export systemd -f turbofit.yaml", "turbofit plan -f FILE --json > plan.json"),
        ("tune internvl2-8b --kv-type 8", "here: --kv-types 8"),
        ("plan internvl2-8b --on rtx 9999 --tp 1", "internvl2-8b --on SPEC --tp 1"),
        ("plan internvl2-8b foo --on t4", "plan internvl2-8b --on t4, which leaves foo out"),
        ("diagnose Serverlog", "name a log file"),
        ("plan foo-9b --on rtx9090", "for the machine: did you mean"),
        ("plan internvl2-8b --on 4xrtx3090,nvlink", "nvlink=0-1+2-3"),
        ("plan ./plan.json", "turbofit serve --plan FILE"),
        ("export systemd turbofit.yaml", "a profile is -f FILE"),
        ("plan internvl2-8b --on 4xrtx3090 --nvlink", "--on 4xrtx3090,nvlink=0-1+2-3"),
        ("plan internvl2-8b --ram 64GiB", "--on 4xrtx3090,ram=64GiB"),
        ("plan internvl2-8b --limit-mm-per-prompt.image 4", "--images 4"),
        ("pretend --on 1xl4 nvidia-smi", "a command stands behind --: -- nvidia-smi"),
        ("export plan.json --format k8s", "turbofit export systemd, compose or k8s"),
        ("logs -f", "tail -F"),
        ("bench http://x -c 16", "did you mean --concurrency?"),
        ("init internvl2-8b --output x.yaml", "here: --out FILE"),
        ("serve internvl2-8b -- --html 3", "leave it out, or take the risk with --unplanned"),
        ("plan internvl2-8b qwen2-vl-7b --cluster=", "leave --cluster out"),
        ("gateway --model internvl2-8b", "--plan FILE, which turbofit plan internvl2-8b --json"),
    ],
)
def test_a_value_of_another_option_or_argument(words: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, *words.split())[1]


def test_words_that_are_missing_or_too_many(capsys: Out) -> None:
    error, hint = refused(capsys, "plan")
    assert error == "MODEL is missing"
    assert hint.startswith("as turbofit plan internvl2-8b")
    of_heads = refused(capsys, "plan", "internvl3-8b", "--on", "4xrtx3090", "--tp", "8")
    assert of_heads[1] == "let turbofit choose --tp and --replicas"  # eight cards change nothing
    assert "--on 4xrtx3090" in refused(capsys, "predict", "internvl2-8b", "4xrtx3090")[1]
    assert "--on 4xrtx3090" in refused(capsys, "plan", "internvl2-8b", "4xrtx3090")[1]
    assert refused(capsys, "compare", "internvl2-8b", "x") == (
        "internvl2-8b cannot be read: No such file or directory",
        "write a plan with turbofit plan MODEL --json > plan.json",
    )


def test_profiles_and_keywords_have_the_same_answer(tmp_path: Path, capsys: Out) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("model: internvl2-8b\nworkload:\n  max_model_len: 8192\n")
    error, hint = refused(capsys, "plan", "-f", str(profile))
    assert error.endswith(": max_model_len is nothing that workload knows")
    assert hint == "an option of vLLM; here: context, below workload"
    with pytest.raises(UsageError) as caught:
        turbofit.plan("internvl2-8b", on="1xrtx3090", tensor_parallel_size=2)
    assert caught.value.hint == "an option of vLLM and SGLang; here: tp=2"


def test_a_tilde_in_quotes_is_the_home(tmp_path: Path, monkeypatch, capsys: Out) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["machine", "--on", "1xrtx3090", "--save", "~/m.json"]) == 0
    assert (tmp_path / "m.json").is_file()
    capsys.readouterr()
    monkeypatch.setenv("TURBOFIT_PLAN_ON", "~/m.json")
    assert main(["plan", "internvl2-8b", "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    assert main(["report", "~/plan.json"]) == 0
    assert main(["serve", "--plan", "~/plan.json", "--dry-run"]) == 0


def test_each_command_says_what_was_assumed_of_a_models_name(monkeypatch, capsys: Out) -> None:
    monkeypatch.setattr(which, "preset_names", lambda: ["rtx3090"])
    on = ["--on", "1xrtx3090"]
    for command, *words in (
        ["serve", *on, "--dry-run"],
        ["plan", *on],
        ["predict", *on],
        ["which"],
    ):
        assert main([command, "gemma3:4b", *words]) in (0, 3)
        captured = capsys.readouterr()
        told = " ".join((captured.out + captured.err).split())
        assert "Ollama's gemma3:4b is GGUF, which LMDeploy does not run" in told


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
    assert "--pretend --on 1xrtx3090 tries it on pretend GPUs" in hint
    assert "turbofit plan MODEL --on SPEC" in hint
    error, hint = refused(capsys, command, "internvl2-8b", "--on", "1xrtx3090")
    assert "--on does not go with it" in error
    assert "--pretend" in hint
    assert "turbofit plan MODEL --on 1xrtx3090" in hint


def test_where_no_gpu_is_others_describe_one(no_gpu: None, tmp_path: Path, capsys: Out) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("model: internvl2-8b\nmachine: {on: 4xrtx3090}\n")
    assert main(["serve", "-f", str(profile)]) == 4
    assert "without a GPU, --pretend tries it" in capsys.readouterr().err
    assert main(["serve", "-f", str(profile), "--dry-run"]) == 0
    assert main(["plan", "internvl2-8b"]) == 4
    told = capsys.readouterr()
    assert "hint: describe a machine with --on SPEC" in told.err
    main(["doctor"])
    text = capsys.readouterr().out
    # Without LMDeploy that is a second one.
    assert re.match(r"no GPU that can be read\n(?:1 stops|2 stop) serving, ", text)
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  fix  "))
    assert lines[at + 1].startswith("       ")


def test_a_persons_own_quotes_stay_and_each_on_is_a_machine() -> None:
    assert mended(["--prompt", "'Read this.'", "'a'"]) == ["--prompt", "'Read this.'", "a"]
    assert mended(["--on=l4", "--on=t4"]) == ["--on", "l4+t4"]


def test_a_secret_before_the_command_is_not_repeated(capsys: Out) -> None:
    for words in (["HF_TOKEN=hf_x", "serve", "internvl2-8b"], ["--api-key=hf_x", "serve"]):
        assert "hf_x" not in "".join(refused(capsys, *words))


def test_a_line_of_many_words_is_answered_soon(monkeypatch, capsys: Out) -> None:
    looked: list[str] = []
    monkeypatch.setattr("turbofit.machine.spec.is_spec", lambda text: bool(looked.append(text)))
    refused(capsys, "what", *["word"] * 5000)
    assert len(looked) < 1000
