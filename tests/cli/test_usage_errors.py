"""Words of other programs at every command: taken, or answered in two lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import turbofit
from turbofit.cli.command_group import COMMANDS
from turbofit.cli.main import main
from turbofit.cli.usage_errors import mended
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan

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
        ("--gpu-memory-utilization=0.5", " 0.5", "here: --budget 50%"),
        ("--max-model-len 8192", " 8192", "an option of vLLM; here: --context 8192"),
        ("--port 80", "", "turbofit serve, gateway, export have it"),
        ("--server-port 80", " 80", "turbofit serve MODEL --port 80"),
        ("--tool-call-parser qwen", "", "behind --: turbofit serve MODEL -- --tool-call-parser"),
        ("--model x/y", " x/y", "here: turbofit plan internvl2-8b x/y --on"),
        ("--imags 2", "", "did you mean --images?"),
        ("--foo 2", "", "see turbofit plan --help"),
        ("--enforce-eager", "", "here: --eager-mode"),
        ("--devices 0,1", " 0,1", "here: --gpus 0,1"),
        ("-o json", "", "here: --json (--md prints Markdown"),
        ("--hf-token hf_x", " ***", "set HF_TOKEN to it"),
        ("--env HF_TOKEN=hf_x", " ***", "NAME=VALUE turbofit"),
        ("--api-keys sk-x", " ***", "--api-key ***"),
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
        ("batch --input a --output b", "INPUT stands without an option: turbofit batch INPUT OUT"),
        ("report --run latest", "turbofit report [OPTIONS] PLAN|RUN|latest"),
        ("batch -i a -o b", "INPUT stands without an option: turbofit batch INPUT OUT"),
        ("merge a b -o c", "OUT stands without an option: turbofit merge [OPTIONS] BASE"),
        ("compare --a x --b y", "A stands without an option: turbofit compare [OPTIONS] A B"),
    ],
)
def test_what_stands_without_an_option(words: str, hint: str, capsys: Out) -> None:
    assert hint in refused(capsys, *words.split())[1]


def test_all_unknown_options_are_named_at_once(capsys: Out) -> None:
    words = "stop m --tensor-parallel-size=4 --time 9 --foo --bar"
    error, hint = refused(capsys, *words.split())
    assert error == "unknown options --tensor-parallel-size 4, --time 9, --foo, --bar"
    assert (
        "--time: an option of docker; here: --wait 9; --foo, --bar: its options are --all, --wait"
        in hint
    )


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
        ("--backend=pytorch", "--backend of LMDeploy is taken as", "engine.name", "pytorch"),
    ],
)
def test_what_is_equal_is_taken_and_said(
    words: str, note: str, field: str, value: object, capsys: Out
) -> None:
    base = ["plan", "internvl2-8b", "--on", "2xrtx3090", "--json"]
    assert main([*base, *words.split()]) == 0
    captured = capsys.readouterr()
    found: object = Plan.from_json(captured.out)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert note in captured.err


def test_the_port_and_the_host_of_lmdeploy_are_the_servers(capsys: Out) -> None:
    words = ["serve", "internvl2-8b", "--on", "1xrtx3090", "--dry-run"]
    assert main([*words, "--server-port", "9000", "--server-name", "127.0.0.1"]) == 0
    captured = capsys.readouterr()
    assert "--server-port 9000" in captured.out
    assert "--server-name of LMDeploy is taken as --host" in captured.err


def test_a_value_is_no_option(capsys: Out) -> None:
    """What follows an option is its value, whatever it looks like; and the model is no value."""
    assert "needs a value before" in refused(capsys, "plan", "m", "--on", "--max-model-len")[0]
    assert refused(capsys, "serve", "--max-model-len", "--tp", "2")[0].endswith("--max-model-len")


def test_behind_the_dashes(capsys: Out) -> None:
    error, hint = refused(capsys, "serve", "m", "--", "--max-model-len", "8192")
    assert "is no option of LMDeploy" in error
    assert hint == "an option of vLLM; here: --context 8192 before --"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("run", "turbofit serve MODEL"),
        ("pull", "turbofit download MODEL"),
        ("ask", "turbofit chat"),
        ("info", "turbofit plan MODEL --full"),
        ("internvl3-8b", "it is a model: turbofit plan internvl3-8b"),
        ("OpenGVLab/InternVL3-8B", "it is a model"),
        ("https://huggingface.co/OpenGVLab/InternVL3-8B", "it is a model"),
        ("qwen2.5vl:7b", "it is a model"),
        ("4xrtx3090", "it is a machine: turbofit plan MODEL --on 4xrtx3090"),
        ("/", "it is a path"),
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
        (["vllm", "serve", "a/b", "--max-model-len", "8192"], "serve a/b --context 8192"),
        (
            ["docker", "run", "--gpus", "all", "vllm/vllm-openai:latest", "--model", "a/b"],
            "plan a/b --gpus all --json",
        ),
        (["sreve", "internvl2-8b", "--tp", "2"], "serve internvl2-8b --tp 2"),
        (["plna", "internvl2-8b"], "plan internvl2-8b"),
        (["what", "is", "internvl2-8b"], "plan internvl2-8b"),
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


def test_a_variable_stands_before_the_program(capsys: Out) -> None:
    hint = refused(capsys, "CUDA_VISIBLE_DEVICES=2", "serve", "internvl2-8b", "--tp", "2")[1]
    assert hint == "as CUDA_VISIBLE_DEVICES=2 turbofit serve internvl2-8b --tp 2"


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
        ("plan OpenGVLab / InternVL2-8B", "as turbofit plan InternVL2-8B"),
        (
            "plan internvl2-8b,internvl2-2b --on t4",
            "plan internvl2-8b internvl2-2b --on t4",
        ),
        ("plan internvl2-8b --on t4 --eager-mode yes", "plan internvl2-8b --on t4 --eager-mode"),
        ("bench http://x --backend vllm", "leave it out"),
        ("$ turbofit plan", "leave out what stands before the command"),
        ("chat -", "write it as http://127.0.0.1"),
        ("serve internvl2 8b", "as turbofit serve internvl2-8b"),
        ("plan qwen", "`turbofit models qwen`"),
        ("plan internvl2-8b --images 1920x1080", "--image-size is their size"),
        ("plan --on internvl2-8b t4", "as turbofit plan internvl2-8b --on t4"),
        ("plan on 2xt4 internvl2-8b --context 8k", "plan internvl2-8b --on 2xt4 --context 8k"),
        ("serve api_server internvl2-8b --tp-size 2", "in all: turbofit serve internvl2-8b --tp 2"),
        ("serve whisper-large-v3 --language zh", "vLLM and Transformers run it"),
        ("plan m --on t4 --max-price 3", "turbofit knows no prices"),
        ("gpus --min-vram 24", "turbofit gpus 24gb"),
        ("gpus --vram 24", "turbofit gpus 24gb"),
        ("models --family internvl", "a word filters"),
        ("plan --model internvl2-8b --on t4", "here: turbofit plan internvl2-8b --on t4"),
        ("plan internvl2-8b --load-in-4bit", "as internvl2-8b-awq"),
        ("plan internvl2-8b --on t4 --model-format awq", "InternVL2-8B-AWQ, its 4 bits"),
        ("plan internvl2-8b --on t4 --dp 2", "--replicas 2"),
        ("plan internvl2-8b --on t4 --replicas 2", "a machine of 2 GPUs, as --on 2xrtx3090"),
        ("predict m --lmdeploy-version 0.6.0", "did you mean --lmdeploy?"),
        ("export internvl2-8b --on 1xl4 --k8s", "as turbofit export k8s internvl2-8b --on 1xl4"),
        ("report plan.json --html", "--html FILE: one page; - for stdout"),
        ("chat gpt-4o", "write it as http://127.0.0.1:23333"),
        ("which --on t4 --vision", "turbofit models vl"),
        ("plan internvl2-8b --precision int4", "as internvl2-8b-awq"),
        ("completion --bash", "as turbofit completion bash"),
        ("gateway --upstream http://x:1", "add --plan FILE, which turbofit plan MODEL --json"),
        ("compare internvl2-8b --on t4 --on l4", "turbofit plan internvl2-8b --on SPEC --json"),
        ("which qwen2-vl-7b --images 2 --context 16k", "--image-size 1920x1080 says what clients"),
        ("export helm m --namespace ai", "kubectl apply -n NAMESPACE"),
        ("machine kill 12", "machine only shows"),
        ("compare t4 vs l4 internvl2-8b", "page --models internvl2-8b --cards t4 l4"),
        ("merge ./lora internvl2-8b out", "turbofit merge internvl2-8b ./lora out"),
        ("diagnose error.png", "paste the message in quotes"),
        ("batch in.jsonl out.xlsx --model m", "name out.jsonl"),
        ("plan internvl2-8b --on t4 --tp 0 --images -1", "--tp: GPUs of one engine; it may"),
        ("bench http://x --rate abc", "an open loop (Poisson); it may be left out"),
        ("bench http://x --prompt-token 5", "did you mean --prompt-tokens?"),
        ("batch a b --url x --prompt-file p", '--prompt "$(cat FILE)"'),
        ("export systemd -f turbofit.yaml", "turbofit plan -f FILE --json > plan.json"),
        ("tune internvl2-8b --kv-type 8", "here: --kv-types 8"),
        ("serve internvl2-8b --temp 0.7", "a request's own"),
        ("plan internvl2-8b --used-memory 4GiB", "takes no more of each card"),
        ("plan internvl2-8b --on rtx 9999 --tp 1", "internvl2-8b --on SPEC --tp 1"),
        ("plan internvl2-8b foo --on t4", "plan internvl2-8b --on t4, which leaves foo out"),
        ("diagnose Serverlog", "name a log file"),
        ("bacth internvl2-8b in out", "did you mean batch?"),
        ("plan foo-9b --on rtx9090", "for the machine: did you mean"),
        ("plan internvl2-8b --gpus 4xrtx3090", "it is a machine: --on 4xrtx3090"),
        ("plan internvl2-8b --on 4xrtx3090,nvlink", "nvlink=0-1+2-3"),
        ("plan ./plan.json", "turbofit serve --plan FILE"),
        ("pretend --on 1xl4 nvidia-smi", "a command stands behind --: -- nvidia-smi"),
        ("models --on 1xl4", "here: turbofit which --on 1xl4"),
        ("export plan.json --format k8s", "turbofit export systemd, compose or k8s"),
        ("chat --image a.png", "a picture is a path"),
        ("logs -f", "tail -F"),
        ("ps -a", "ps lists all servers of this user"),
        ("page -o site", "here: --out DIR"),
        ("bench http://x -c 16", "did you mean --concurrency?"),
        ("stop --model internvl2-8b", "here: turbofit stop internvl2-8b"),
        ("download -m internvl2-8b", "here: turbofit download internvl2-8b"),
        ("batch -m internvl2-8b a b", "here: --model internvl2-8b"),
        ("init internvl2-8b --output x.yaml", "here: --out FILE"),
        ("chat --format json", "see turbofit chat --help"),
        ("serve internvl2-8b -- --html 3", "leave it out, or take the risk with --unplanned"),
        ("serve internvl2-8b -- --watch 3", "leave it out, or take the risk with --unplanned"),
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
    assert "--on 4xrtx3090" in refused(capsys, "predict", "internvl2-8b", "4xrtx3090")[1]
    assert "--on 4xrtx3090" in refused(capsys, "plan", "internvl2-8b", "4xrtx3090")[1]
    assert refused(capsys, "compare", "internvl2-8b", "x") == (
        "internvl2-8b is a model, and no document: No such file or directory",
        "write a plan with turbofit plan internvl2-8b --json > plan.json",
    )


def test_variables_profiles_and_keywords_have_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv("TURBOFIT_PLAN_MAX_MODEL_LEN", "8192")
    said = refused(capsys, "plan", "internvl2-8b", "--on", "1xrtx3090")
    assert said[1] == "an option of vLLM; here: TURBOFIT_PLAN_CONTEXT=8192"
    monkeypatch.delenv("TURBOFIT_PLAN_MAX_MODEL_LEN")
    profile = tmp_path / "p.yaml"
    profile.write_text("model: internvl2-8b\nworkload:\n  max_model_len: 8192\n")
    said = refused(capsys, "plan", "-f", str(profile))
    assert said[0].endswith(": max_model_len is nothing that workload knows")
    assert said[1] == "an option of vLLM; here: context, below workload"
    with pytest.raises(UsageError) as error:
        turbofit.plan("internvl2-8b", on="1xrtx3090", tensor_parallel_size=2)
    assert error.value.hint == "an option of vLLM and SGLang; here: tp=2"


def test_a_tilde_in_quotes_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["machine", "--on", "1xrtx3090", "--save", "~/m.json"]) == 0
    assert (tmp_path / "m.json").is_file()
    capsys.readouterr()
    monkeypatch.setenv("TURBOFIT_PLAN_ON", "~/m.json")
    assert main(["plan", "internvl2-8b", "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    assert main(["report", "~/plan.json"]) == 0
    assert main(["serve", "--plan", "~/plan.json", "--dry-run"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--on", "1xrtx3090", "--dry-run"),
        ("plan", "--on", "1xrtx3090"),
        ("predict", "--on", "1xrtx3090"),
        ("which",),
    ],
)
def test_each_command_says_what_was_assumed_of_a_models_name(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    from turbofit.planning import which

    monkeypatch.setattr(which, "preset_names", lambda: ["rtx3090"])
    assert main([words[0], "gemma3:4b", *words[1:]]) in (0, 3)
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert "Ollama's gemma3:4b is GGUF, which LMDeploy does not run" in said


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbofit.core.errors import NoGpuError
    from turbofit.machine import nvml_machine

    def nothing(*_: object) -> None:
        raise NoGpuError("NVML cannot be opened", hint="describe a machine with --on SPEC")

    monkeypatch.setattr(nvml_machine, "measure_in_time", nothing)


@pytest.mark.parametrize("command", ["serve", "tune", "calibrate"])
def test_where_no_gpu_is_a_launch_says_what_can_be_done_here(
    command: str, no_gpu: None, tmp_path: Path, capsys: Out
) -> None:
    """And nobody is sent from one hint to the next: what a hint says to add is taken."""
    assert main([command, "internvl2-8b"]) == 4
    hint = capsys.readouterr().err.splitlines()[-1]
    assert "--pretend --on 1xrtx3090 tries it on pretend GPUs" in hint
    assert "turbofit plan MODEL --on SPEC" in hint
    error, hint = refused(capsys, command, "internvl2-8b", "--on", "1xrtx3090")
    assert "--on does not go with it" in error
    assert "--pretend" in hint
    assert "turbofit plan MODEL --on 1xrtx3090" in hint


def test_a_profiles_machine_is_the_pretended_one(no_gpu: None, tmp_path: Path, capsys: Out) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("model: internvl2-8b\nmachine: {on: 4xrtx3090}\n")
    assert main(["serve", "-f", str(profile)]) == 4
    assert "without a GPU, --pretend tries it" in capsys.readouterr().err
    assert main(["serve", "-f", str(profile), "--dry-run"]) == 0


def test_a_plan_without_a_gpu_describes_one(no_gpu: None, capsys: Out) -> None:
    assert main(["plan", "internvl2-8b"]) == 4
    assert "hint: describe a machine with --on SPEC" in capsys.readouterr().err


def test_doctor_counts_in_words_and_hangs_what_it_says(no_gpu: None, capsys: Out) -> None:
    main(["doctor"])
    text = capsys.readouterr().out
    # Without LMDeploy that is a second one.
    assert re.match(r"no GPU that can be read\n(?:1 stops|2 stop) serving, ", text)
    assert "1 stops," not in text
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  fix  "))
    assert lines[at + 1].startswith("       ")


def test_a_persons_own_quotes_stay_and_each_on_is_a_machine() -> None:
    assert mended(["--prompt", "'Read this.'", "'a'"]) == ["--prompt", "'Read this.'", "a"]
    assert mended(["--on=l4", "--on=t4"]) == ["--on", "l4+t4"]


def test_a_secret_before_the_command_is_not_repeated(capsys: Out) -> None:
    for words in (["HF_TOKEN=hf_x", "serve", "internvl2-8b"], ["--api-key=hf_x", "serve"]):
        assert "hf_x" not in "".join(refused(capsys, *words))


def test_a_line_of_many_words_is_answered_soon(
    monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    looked: list[str] = []
    monkeypatch.setattr("turbofit.machine.spec.is_spec", lambda text: bool(looked.append(text)))
    refused(capsys, "what", *["word"] * 5000)
    assert len(looked) < 1000


def test_a_form_of_the_answer_has_no_variable(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TURBOFIT_PLAN_JSON", "1")
    assert refused(capsys, "plan", "internvl2-8b")[1] == "--json has no variable: type it"
