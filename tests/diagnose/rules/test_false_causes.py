"""No row answers another program's words, or needs a time that grows faster than its line."""

from __future__ import annotations

import re
from pathlib import Path
from re import _parser  # type: ignore[attr-defined] - the only way to see what a pattern needs
from typing import Any, Final

import pytest

from tests.diagnose.conftest import explain, message, some
from turbofit.diagnose.rules.causes import causes, pattern_of

HERE: Final = Path(__file__).parent
#: What is said where nothing failed, and nothing is known.
QUIET: Final = ("unknown", "healthy", "peer_warning")


def _logs(name: str) -> dict[str, list[str]]:
    """Logs of a file by their headings, written for this test: made-up details."""
    logs: dict[str, list[str]] = {}
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("=== "):
            heading = line[4:]
            logs[heading] = []
        else:
            logs[heading].append(line)
    return logs


FOREIGN: Final = _logs("foreign.txt")
HEALTHY: Final = _logs("healthy.txt")


@pytest.mark.parametrize("log", [*FOREIGN.values(), *HEALTHY.values()], ids=[*FOREIGN, *HEALTHY])
def test_logs_of_other_programs_and_healthy_ones_have_no_cause(log: list[str]) -> None:
    found = explain("\n".join(log))
    assert message(found) in QUIET, found.what
    assert not found.also


#: A person's question where it stands alone, whoever raised or printed it: an exception of Python,
#: and sentences of Docker, systemd and curl that say what happened to any program.
ANSWERED_ALONE: Final = re.compile(
    r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception): |docker: |curl: \(7\)|exec \S+: exec format error"
    r"|[\w-]+ exited with code 13[79]|.*(?:pull access denied|status=9/KILL)"
)


@pytest.mark.parametrize("log", FOREIGN.values(), ids=FOREIGN)
def test_a_line_of_another_program_has_no_cause(log: list[str]) -> None:
    for line in log:
        found = explain(line)
        assert ANSWERED_ALONE.match(line) or message(found) in QUIET, (line, found.what)


TRACEBACK: Final = (
    "Traceback (most recent call last):\n"
    '  File "/srv/demo.py", line 3, in <module>\n    import album\n'
    '  File "/srv/album.py", line 9, in load\n    open_it()\n    ^^^^^^^^^\n'
)
CAUSED: Final = "\nThe above exception was the direct cause of the following exception:\n\n"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("missing_package", "ModuleNotFoundError: No module named 'decord'"),
        ("disk_full", "OSError: [Errno 28] No space left on device"),
        ("bad_json", "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("no_server", "openai.APIConnectionError: Connection error."),
    ],
)
def test_an_error_with_its_own_traceback_is_answered_as_its_last_line_is(
    kind: str, error: str
) -> None:
    other = f"{TRACEBACK}there.NobodyKnowsError: this"
    for log in (
        error,
        f"$ python demo.py\n{TRACEBACK}{error}",
        f"{other}\n{CAUSED}{TRACEBACK}{error}",
    ):
        assert message(explain(log)) == kind, log
    assert message(explain(f"{TRACEBACK}{error}\n{other}\n")) == "unknown"


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("not_installed", "bash: lmdeploy: command not found"),
        ("no_gpu", "No devices were found"),
        ("killed", "Exited (137) 3 minutes ago"),
        ("build_failed", "fatal error: Python.h: No such file or directory"),
        ("no_server", "curl: (7) Failed to connect to localhost port 23333: Connection refused"),
    ],
)
def test_what_a_tool_says_is_answered_where_it_is_all_there_is(kind: str, log: str) -> None:
    assert message(explain(log)) == kind


ROOT: Final = "ValueError: there is no such plane\n"
PROGRESS: Final = (
    "INFO 03-02 11:20:01 [core.py:58] step 1 of lmdeploy\nLoading:  50%|#####     | 2/4\n"
)
KNOWN: Final = "ModuleNotFoundError: No module named 'timm'\n"
PROBES: Final = 3 * 'INFO:     127.0.0.1:40 - "GET /health HTTP/1.1" 200 OK\n'
FAULT: Final = "[TM][FATAL] a.cu(80): CUDA error: an illegal memory access was encountered\n"


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        # What a run went on after is not what ended it, and a child's error right before is.
        (f"{KNOWN}{PROGRESS}{ROOT}", "unknown"),
        (f"{KNOWN}{PROGRESS}torch.OutOfMemoryError: CUDA out of memory.\n{ROOT}", "out_of_memory"),
        (f"{KNOWN}{ROOT}", "missing_package"),
        (f"{KNOWN}{PROGRESS}", "missing_package"),
        # A server answers probes, and NCCL's threads speak, after an engine has died; and nothing
        # goes on after a fault of CUDA.
        (f"lmdeploy\n{KNOWN}{PROBES}{ROOT}", "missing_package"),
        (f"{FAULT}{PROBES}{ROOT}", "illegal_access"),
        (f"torch.OutOfMemoryError: CUDA out of memory.\n{PROGRESS}{ROOT}", "out_of_memory"),
        (
            "a:1:2 [0] NCCL WARN Error: failed to extend /dev/shm/nccl-x to 33030532 bytes\n"
            f"a:1:2 [0] NCCL INFO x -> 2\na:1:2 [0] NCCL INFO y -> 2\n{ROOT}",
            "shared_memory",
        ),
        # An exception of a destructor ends nothing.
        (
            f"{ROOT}Exception ignored in: <function LLM.__del__ at 0x7f>\nTraceback (most recent"
            " call last):\nModuleNotFoundError: No module named 'lmdeploy._C'\n",
            "unknown",
        ),
        (
            "Exception ignored in: <function LLM.__del__ at 0x7f>\nTraceback (most recent call"
            " last):\nAttributeError: 'LLM' object has no attribute 'engine'\n",
            "unknown",
        ),
        (
            "Exception ignored in: <_io.TextIOWrapper name='<stdout>' mode='w' encoding='utf-8'>\n"
            "OSError: [Errno 28] No space left on device\n",
            "disk_full",
        ),
        # A check's sentence without a stack is a program's, where the log names one.
        (
            "lmdeploy\nValueError: Speculative decoding is not supported with pipeline"
            " parallelism yet.\n",
            "unsupported_feature",
        ),
        # A warning alone tells of the machine at most.
        (
            "WARNING 03-02 [x.py:1] lmdeploy: ModuleNotFoundError: No module named 'lmdeploy._C'\n",
            "unknown",
        ),
        ("INFO: No module named 'lmdeploy._C', falling back to torch\n", "unknown"),
    ],
)
def test_the_answer_is_about_what_ended_the_run(log: str, kind: str) -> None:
    found = explain(log)
    assert message(found) == kind
    assert kind != "unknown" or found.evidence


def test_a_long_path_is_named_whole() -> None:
    path = "/srv/" + "/".join(["a-folder-with-a-name"] * 40) + "/config.json"
    found = explain(f"PermissionError: [Errno 13] Permission denied: '{path}'")
    assert found.kind == "no_permission"
    assert path in found.what


def test_of_a_few_lines_that_nobody_knows_the_command_is_asked_for() -> None:
    assert any("command that was run" in line for line in explain(ROOT).send)
    longer = explain(f"{PROGRESS}{PROGRESS}{ROOT}")
    assert longer.kind == "unknown"
    assert not any("command that was run" in line for line in longer.send)


def _starts(pattern: Any) -> bool:
    """Whether a match may begin with a repeat that has no bound: each place of a line is tried."""
    for operation, value in pattern:
        name = str(operation)
        if name == "AT":
            return False
        if name.startswith("ASSERT"):
            continue
        if name.endswith("REPEAT"):
            least, most, repeated = value
            if most == _parser.MAXREPEAT or _starts(repeated):
                return True
            if least == 0:
                continue
        elif name == "BRANCH":
            return any(_starts(way) for way in value[1])
        elif name == "SUBPATTERN":
            return _starts(value[-1])
        return False
    return False


def _repeats(pattern: Any) -> int:
    """Repeats without a bound that follow each other in one way through a pattern."""
    count = 0
    for operation, value in pattern:
        name = str(operation)
        if name == "BRANCH":
            count += max(_repeats(way) for way in value[1])
        elif name.endswith("REPEAT"):
            count += (value[1] == _parser.MAXREPEAT) + _repeats(value[2])
        elif name == "SUBPATTERN":
            count += _repeats(value[-1])
    return count


def test_no_pattern_needs_the_square_of_a_line() -> None:
    """By its form: a name has a bound, a way through has few other repeats, and a start a word."""
    assert _starts(_parser.parse(r"(?:a|\S*b)"))
    assert not _starts(_parser.parse(r"^.*b|a.*"))
    assert _repeats(_parser.parse(r"a.*(?:b.*c.*|d.{0,9})")) == 3
    for row in causes():
        pattern = _parser.parse(pattern_of(row.pattern).pattern)
        assert not _starts(pattern), row.pattern
        assert _repeats(pattern) <= 4, row.pattern


INFO: Final = (
    "2026-03-02 11:00:0{} - lmdeploy - INFO - engine.py:9 - forward {} images, cost 0.4s\n"
)
NO_ERROR: Final = "turbofit recognises no error in this log"
CALM: Final = "".join(INFO.format(n, n) for n in range(5))


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (CALM, NO_ERROR),
        (f"{CALM}2026-03-02 - lmdeploy - WARNING - archs.py:5 - loading of a.b failed, using b",
         NO_ERROR),
        (f"{CALM}WARNING 03-02 [x.py:1] lmdeploy: ModuleNotFoundError: No module named 'moon._C'\n",
         "this log has a warning, and no error: "),
        (f"{CALM}/v/torch/a.py:9: UserWarning: MOONS is not set\nIf you do not want it, set it\n",
         NO_ERROR),
        ("one\ntwo\n", NO_ERROR),
        (f"{CALM}2026-03-02 - lmdeploy - ERROR - the moon is full\n",
         "turbofit does not know this message: "),
    ],
)  # fmt: skip
def test_a_log_without_an_error_is_said_to_have_none(log: str, told: str) -> None:
    found = explain(log)
    assert not found.known
    assert found.what.startswith(told)


@pytest.mark.parametrize(
    ("request_line", "healthy"),
    [
        ('GET /run HTTP/1.1" 404 Not Found', True),
        ('POST /run HTTP/1.1" 200 OK', True),
        ('POST /run HTTP/1.1" 401 Unauthorized', True),  # anybody may send it
        ('POST /run HTTP/1.1" 405 Method Not Allowed', True),
        ('POST /run HTTP/1.1" 422 Unprocessable Entity', False),
        ('POST /run HTTP/1.1" 500 Internal Server Error', False),
    ],
)
def test_a_server_that_refuses_requests_is_not_healthy(request_line: str, healthy: bool) -> None:
    up = "INFO:     Application startup complete.\n"
    found = explain(f'{up}INFO:     127.0.0.1:33142 - "{request_line}\n')
    assert found.known == healthy
    assert healthy or request_line[-12:] in found.what


NOT_KNOWN: Final = "turbofit does not know this message:"
CUT: Final = ", within a traceback and before the error itself; its last call is:"
UNENDED: Final = (
    "Exception in callback <function f at 0x7f>\nTraceback (most recent call last):\n"
    '  File "/v/lmdeploy/vl/x.py", line 90, in f\n    a = self._slice(image)\n    ^^^^^^\n'
)


@pytest.mark.parametrize(
    ("log", "told", "where"),
    [
        ("'MoonEngine' object has no attribute 'tide'", f"{NOT_KNOWN} 'MoonEngine' object", ()),
        ("I want 9 tokens\nlen 7 should be equal to N (9)\nbye", f"{NOT_KNOWN} len 7 should", ()),
        (f"{UNENDED}_queue.Empty\n", f"{NOT_KNOWN} _queue.Empty", ("f",)),
        ("# MoonEngine has no tide\nI failed to start it", "report's title says: MoonEngine",
         ("the text says: I failed to start it",)),
        (UNENDED, f"line 5{CUT} a = self._slice(image)", ("f",)),
        (f"# [Bug] MoonError: no tide\n{UNENDED}", f"{CUT[:-18]} the report's title says: Moon",
         ("its last call is: a = self._slice(image)", "f")),
        (f"{UNENDED}  File \"/a", f"{CUT} a = self._slice(image)", ("f",)),
        ("".join(f"(RayWorker pid=3) {line}\n"
                 for line in ('  File "/v/lmdeploy/x.py", line 7, in g', "    assert moons > 1")),
         f"{CUT} assert moons > 1", ("g",)),
    ],
)  # fmt: skip
def test_a_line_that_looks_like_an_error_is_quoted(
    log: str, told: str, where: tuple[str, ...]
) -> None:
    found = explain(log)
    assert not found.known
    assert told in found.what
    assert found.what.rpartition(": ")[2] in found.evidence[0].text
    assert CUT not in told or "the lines after the last one here" in found.send[0]
    assert tuple(why.rpartition(" in ")[2] for why in found.why) == where


def test_a_warning_is_less_than_what_the_title_tells() -> None:
    warned = "[TM][WARNING] Device 1 peer access Device 2 is not available.\n"
    found = explain(f"[Bug] 0.5.0 会卡死\n\n{warned}")
    said = "the report's title says: 0.5.0 会卡死"
    assert found.what == f"no line of this log tells what failed; {said}"
    assert "py-spy" in some(found.others).tried[0]
    assert explain(warned).kind == "peer_warning"


def test_a_title_that_tells_of_trouble_is_no_healthy_log() -> None:
    up = "INFO:     Application startup complete.\n"
    assert explain(f"my server\n\n{up}").kind == "healthy"
    found = explain(f"[Bug] /moon 返回错误的内容\n\n### Describe the bug\n{up}")
    assert "the report's title says: /moon 返回错误的内容" in found.what
    assert found.also == ("line 4: nothing failed in this log: the engine started",)


def test_a_pasted_block_without_its_end_was_cut() -> None:
    """What was pasted goes on; a sentence that tells what works is quoted beside the title."""
    said = "Release 2.0.1 works well, but not 2.1."
    begins = "2026-03-02 10:00:00,100 - lmdeploy - INFO - builder.py:1 - loading"
    report = f"[Bug] lmdeploy 报错\n\n{said}\n```\n"
    found = explain(f"{report}$ lmdeploy chat m\n{begins}\n")
    assert found.what.startswith("this text ends at line 6, within its log")
    assert found.why == (f"the text says: {said}",)
    assert found.send[0].startswith("the lines after the last one here")
    # A list of packages is no log that goes on.
    found = explain(f"{report}sys.platform: linux\nGCC: gcc 11.4.0\n")
    assert found.what == "this text has no log; the report's title says: lmdeploy 报错"
    assert found.first == found.send[0]
    assert "what was asked, what came" in found.first


def test_a_version_ends_where_another_script_begins() -> None:
    assert explain("# 用 lmdeploy=0.5.3也没办法跑通\n").read.version == "0.5.3"


def test_source_lines_are_no_message() -> None:
    found = explain("Traceback\n 19              f'<{name}> test failed!\\n'\n---> 22 exit(1)\n")
    assert found.evidence == ()


def test_an_error_goes_before_a_line_that_only_looks_like_one() -> None:
    assert "the moon fell" in explain("ERROR the moon fell\nphase must be full\n").what


RAISED: Final = (
    'Traceback (most recent call last):\n  File "/a/{}/vl/x.py", line 4, in {}\n    {}\n{}\n'
)
LACKS: Final = "AttributeError: '{}' object has no attribute 'x'"


@pytest.mark.parametrize(
    ("kind", "package", "function", "code", "error"),
    [
        ("unknown", "lmdeploy", "f", "assert moons == 1", "AssertionError"),
        ("unknown", "lmdeploy", "f", "x = LAYERS[name]", "KeyError: 'MoonLayer'"),
        ("unknown", "lmdeploy", "f", "m.x()", LACKS.format("Moon")),
        ("no_chat_template", "lmdeploy", "proc_messages", "x = y + t.messages2prompt(m)",
         'TypeError: can only concatenate str (not "NoneType") to str'),
        ("unknown", "album", "load_weights", "assert a.shape == b.shape", "AssertionError"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("indented", [True, False])
def test_what_ends_an_engine_s_own_code_is_a_list_and_no_cause(
    kind: str, package: str, function: str, code: str, error: str, *, indented: bool
) -> None:
    """Also where a page has lost the indentation."""
    log = RAISED.format(package, function, code, error)
    found = explain(log if indented else log.replace("\n    ", "\n").replace("\n  ", "\n"))
    assert message(found) == kind
    assert not found.known
    assert found.others is None or len(some(found.others).had) * len(some(found.others).tried) > 0


def test_a_program_s_next_line_is_no_code_of_the_frame_before() -> None:
    frame = 'Traceback (most recent call last):\n  File "/a/lmdeploy/x.py", line 4, in f\n'
    for line in ("2026-03-02 - lmdeploy - ERROR - the moon is full", "ERROR: the moon failed"):
        assert line in explain(f"{frame}{line}\n").what


def test_nccl_s_level_of_errors_is_no_warning() -> None:
    line = "lmdeploy\nh:7:9 [0] socket.cc:4 NCCL WARN Call to connect returned refused, retrying\n"
    assert "no error" not in explain(line).what
