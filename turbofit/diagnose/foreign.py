"""Finds out whether another program wrote a log: which one, and its version."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from turbofit.observe.log_reader import Form

#: Lines, commands and frames of LMDeploy itself: a log with one of these is LMDeploy's.
_LMDEPLOY: Final = re.compile(
    r" - lmdeploy - |\[TM\]|[/\\]lmdeploy[/\\\"]"
    r"|\blmdeploy(?: (?:serve|chat|lite|convert|check_env)|=)"
    r"|(?:import|from) lmdeploy|[Tt]urbo[Mm]ind|TURBOMIND|PytorchEngineConfig|turbofit|Avg thr \(in"
).search
_VERSION: Final = r"[=: (-]{1,3}v?(\d+\.\d+[\w.+]*)"


class _Program(NamedTuple):
    name: str
    marks: str
    version: str = r"(?!)"


#: Engines: a log that names one belongs to it, with any error.
_ENGINES: Final = (
    _Program("vLLM", r"(?<![/\\])\bvllm\b|[/\\]vllm[/\\][\w/\\]+\.py\b|bin[/\\]vllm\b"
             r"|EngineCore|VllmWorker|RayWorkerVllm|MQLLMEngine|\bvLLM\b|gpu_memory_utilization|max_model_len"
             r"|desired GPU memory utilization",
             rf"vLLM API server version (\d\S*)|LLM engine \(v([\d.]+\w*)\)|\bvllm{_VERSION}"),
    _Program("SGLang", r"\bsglang\b|\bSGLang\b|server_args=ServerArgs|--mem-fraction-static",
             rf"\bsglang{_VERSION}"),
    _Program("text-generation-inference",
             r"text[-_]generation[-_](?:launcher|inference|server|router)",
             rf"text-generation-inference{_VERSION}"),
    _Program("TensorRT-LLM", r"tensorrt_llm|TensorRT-LLM|\[TRT-LLM\]|trtllm",
             r"TensorRT-LLM version: (\d\S*)"),
    _Program("llama.cpp",
             r"llama_(?:model_load|context|init)|llama-(?:server|cli)\b|\bggml_|llama\.cpp"
             r"|common_chat_templates|\bllama_decode\b|\bsrv +(?:update_slots|load_model)",
             r"\bbuild(?: =|:) (\d+)"),
    _Program("Ollama", r"\b[Oo]llama\b(?!://)|llama runner process", rf"\bollama{_VERSION}"),
    _Program("FastLLM", r"\bFastLLM\b|\bftllm\b|libfastllm"),
    _Program("FastDeploy", r"(?i:\bfastdeploy(?:server)?\b)"),
    _Program("Triton Inference Server", r"\btritonserver\b|model_repository_manager"),
    _Program("MLC LLM", r"\bmlc[-_](?:llm|chat)\b|\bMLCEngine"),
    _Program("KTransformers", r"(?i:\bktransformers\b)"),
    _Program("llama-cpp-python", r"[/\\]llama_cpp[/\\]|\bllama-cpp-python\b"),
    _Program("Xinference", r"(?i:\bxinference\b)"),
    _Program("GPUStack", r"(?i:\bgpustack\b)"),
    _Program("LM Studio", r"(?i:\blm[ -]?studio\b)"),
    _Program("text-generation-webui", r"\btext-generation-webui\b"),
    _Program("stable-diffusion-webui", r"\bstable-diffusion-webui\b"),
    _Program("InvokeAI", r"(?i:\binvokeai\b)"),
)  # fmt: skip
#: Text that only one engine's own lines contain, even if it includes other engines.
_SURE: Final = re.compile(
    r"(?P<SGLang>[/\\]sglang[/\\]srt\b)|(?P<Ollama>\bollama\[|llama runner process)"
    r"|(?P<vLLM>\(EngineCore|VllmWorker|vLLM API server version)"
).search
#: Programs that install, run or use others: a log belongs to one only if no row knows its error.
_TOOLS: Final = (
    _Program("Kubernetes", r"\bkubelet\b|\bkubectl\b|FailedScheduling|BackOff\b|nvidia\.com/gpu"),
    _Program("Docker", r"\b[Dd]ocker: |Error response from daemon|OCI runtime|nvidia-container-cli"
             r"|\b[Dd]ocker daemon|manifest (?:for|unknown)|pull rate limit|exec format error"),
    _Program("pip", r"(?:ERROR|error): (?:Could not (?:find a version|build wheels)|No matching"
             r"|pip's|ResolutionImpossible|Cannot install|Failed building|metadata-generation"
             r"|subprocess-exited|Command errored out|externally-managed|Package '"
             r"|\S+\.whl is not)|requires \S+, but you have|Failed to build [`\w]"
             r"|Building wheel for|looks like a filename|Invalid requirement"
             r"|conflicting dependencies|<pip-setuptools-caller>"),
    _Program("MLX", r"\bmlx[-_](?:lm|vlm|llm)\b"),
    _Program("ComfyUI", r"\bComfyUI\b"),
    _Program("LangChain", r"(?i:\blangchain(?:_\w+)?\b)"),
    _Program("lm-evaluation-harness", r"\blm[-_]eval(?:uation)?\b"),
    _Program("LLaMA-Factory", r"(?i:\bllama-?factory\b)"),
    _Program("torchtune", r"\btorchtune\b"),
    _Program("Ray", r"[/\\]ray[/\\]_private[/\\]|\bray\.init\("),
    _Program("systemd", r"\bsystemd\[\d+\]: "),
)  # fmt: skip
#: A command without a prompt, or an error: no mere mention of a program.
_RUNS: Final = re.compile(r"\b(?:server?|run|launch)\b| --\w|\bError: ").search
_ALL: Final = {program.name: program for program in (*_ENGINES, *_TOOLS)}
_ANY: Final = re.compile(
    "|".join(f"(?P<p{number}>{one.marks})" for number, one in enumerate(_ALL.values()))
).search


class ForeignPrograms:
    """Counts the lines of a log by the program that wrote them."""

    def __init__(self) -> None:
        self.of_lmdeploy = False
        #: Whether a line names LMDeploy in any form.
        self.names_lmdeploy = False
        self._sure = ""
        self._lines = Counter[str]()
        self._versions: dict[str, str] = {}

    def notice(self, text: str, form: Form, *, by_person: bool = False) -> None:
        """Read one line of the log, of any kind; people mention programs, also in other logs."""
        if self.of_lmdeploy:
            return
        self.of_lmdeploy = form.ask(_LMDEPLOY) is not None
        self.names_lmdeploy = self.names_lmdeploy or "lmdeploy" in text.lower()
        if sure := form.ask(_SURE):
            self._sure = str(sure.lastgroup)
        mention = by_person and form.ask(_RUNS) is None
        if not mention and (named := form.ask(_ANY)):
            self.found(list(_ALL)[int(str(named.lastgroup)[1:])], text)

    def named_in(self, form: Form) -> bool:
        """Whether lines of this form count for another program."""
        return not self.of_lmdeploy and form.ask(_ANY) is not None

    def found(self, name: str, text: str = "") -> None:
        """Count a line of a program, recognised by its text or its prefix."""
        self._lines[name] += 1
        match = re.search(_ALL[name].version, text) if name not in self._versions else None
        if match:
            self._versions[name] = next(group for group in match.groups() if group)

    @property
    def engine(self) -> str:
        """The engine that wrote the log; empty if that is LMDeploy, or if no line names one.

        A text that names LMDeploy in any way belongs to another engine only by that engine's own
        lines: people compare engines.
        """
        if self._sure and not self.of_lmdeploy:
            return self._sure
        return "" if self.names_lmdeploy else self._of(_ENGINES)

    @property
    def tool(self) -> str:
        return self._of(_TOOLS)

    def version(self, name: str) -> str | None:
        return self._versions.get(name)

    def _of(self, programs: tuple[_Program, ...]) -> str:
        lines = {one.name: self._lines[one.name] for one in programs if self._lines[one.name]}
        return max(lines, key=lambda name: lines[name]) if lines and not self.of_lmdeploy else ""
