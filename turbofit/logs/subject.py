"""Finds the facts of the run in a log: model, cards, options, variables, version, program."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.machine.presets import MAY_BE_CARD, NamedCards, cards_in
from turbofit.model.names import families, names_in, preset_of

if TYPE_CHECKING:
    from turbofit.logs.log_reader import Form

_NAME = r"['\"]?([\w./~-]*[A-Za-z][\w./-]*)['\"]?"
#: Places where commands and code name a model, the surest place first.
_MODEL: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b(?:api_server|lmdeploy\s+(?:chat|serve\s+\w+)|turbofit (?:serve|plan|predict))\s+"
        rf"{_NAME}",
        r"--(?:model(?:[-_]path|[-_]name[-_]or[-_]path|[-_]dir|[-_]base|s)?|checkpoint)"
        rf"[ =]{_NAME}",
        rf"\b(?:pipeline|from_pretrained|resolve_model)\(\s*{_NAME}",
        rf"\b(?:model_path|model_name_or_path|pretrained_model_name_or_path|model)\s*[=:]\s*{_NAME}",
        rf"['\"]model(?:_tag)?['\"]: {_NAME}",
        rf"environ\.get\(\s*['\"]\w+['\"],\s*{_NAME}",
        rf"add_argument\([^)]*(?:model|pretrained)[^)]*default\s*=\s*{_NAME}",
        r"lmdeploy serve api_server [^|;]*?\s(/[\w./-]+|[\w-]+/[\w.-]+)\s*$",
    )
)
#: Lines, commands and frames of LMDeploy itself: a log with one of these is LMDeploy's. The folder
#: of an environment that is called lmdeploy is none of these.
_LMDEPLOY: Final = re.compile(
    r" - lmdeploy - |\[TM\]|[/\\]lmdeploy(?:\"|[/\\](?!(?i:bin|scripts|lib[/\\](?:python|site))))"
    r"|\blmdeploy(?: (?:serve|chat|lite|convert|check_env)|=)"
    r"|(?:import|from) lmdeploy|[Tt]urbo[Mm]ind|TURBOMIND|PytorchEngineConfig|turbofit|Avg thr \(in"
).search
#: Words of other engines' logs. turbofit names the engine and explains nothing.
_OTHERS: Final = re.compile(
    r"(?P<vLLM>[/\\]vllm[/\\][\w/\\]+\.py|\bvllm serve |vLLM API server version"
    r"|\bvllm\.entrypoints)"
    r"|(?P<SGLang>[/\\]sglang[/\\][\w/\\]+\.py|\bsglang\.launch_server|server_args=ServerArgs)"
).search
#: `lmdeploy lite`, by its command or by its frames. No plan helps it, since plans are for serving.
_QUANTISES: Final = re.compile(r"\blmdeploy lite \w|[/\\]lmdeploy[/\\]lite[/\\]").search
#: A training, by its command; and commands of servers, which end it.
_TRAINS: Final = re.compile(
    r"\bswift (?:sft|pt|rlhf)\b|\bllamafactory-cli train\b|\bxtuner train\b"
    r"|(?:python[\d.]*|torchrun|deepspeed|accelerate launch) (?:.{0,200}[/\s])?"
    r"\w*(?:train|finetune|fine_tune|sft|dpo|rlhf|grpo)\w*\.py\b"
).search
_SERVES: Final = re.compile(
    r"\blmdeploy (?:serve|chat|lite)\b|\bswift (?:deploy|infer|export|eval)\b|\bturbofit \w"
    r"|\bpipeline\("
).search
#: LMDeploy's PyTorch engine, by an option, its configuration or its own words.
_PYTORCH: Final = re.compile(
    r"--backend[ =]pytorch|PytorchEngineConfig\(|[Ff]allback to pytorch engine"
    r"|Try to run with pytorch engine|[/\\]lmdeploy[/\\]pytorch[/\\]"
    r"|No enough gpu memory for state cache"
).search
_OPTION: Final = re.compile(
    r"(?:--|\b)(cache[-_]max[-_]entry[-_]count|max[-_]prefill[-_]token[-_]num|max[-_]batch[-_]size"
    r"|session[-_]len|quant[-_]policy|cache[-_]block[-_]seq[-_]len|communicator|dtype"
    r"|model[-_]format|tp)(?:\s*=\s*|\s+)['\"]?([\w.-]+)"
)
#: The release, in a text in lower case.
_VERSION: Final = re.compile(
    r"lmdeploy(?:(?:(?:[=:：~ <>]|的|版本|是|为)+|\S* version:? )v?(\d+\.\d+(?:\.\w+)*)"
    r"|[-_](\d+\.\d+\.\d+)\S*\.whl)",
    re.ASCII,
)
#: A package with its release, as pip, LMDeploy's check_env and people print them, in lower case.
_PACKAGE: Final = re.compile(
    r"\W{0,4}(lmdeploy|(?:py)?torch|torchvision|triton|transformers|tokenizers|accelerate|ray|dlinfer"
    r"|flash[-_]attn|flash[-_]mla|flashinfer|deep[-_]gemm|xgrammar|tilelang|apache-tvm-ffi|numpy|timm"
    r"|bitsandbytes|peft|swift|ms[-_]swift|vlmeval|datasets|safetensors)"
    r"(?:\[\w*\])?(?: version)?(?: *(?:==|[:：=]) *| {1,60}|\t)v?(\d+\.\d+[\w.]*)",
    re.ASCII,
)
_TORCHRUN: Final = re.compile(r"(?:torchrun|torch\.distributed\.run|accelerate launch)\b(.*)")
_RANKS: Final = re.compile(r"--(?:nproc[-_]per[-_]node|num[-_]processes)[ =](\d+)")
#: Accelerate moved weights to host memory or disk, since the cards had no room.
_OFFLOADED: Final = re.compile(
    r"on the meta device because they were offloaded to the (?:cpu|disk)"
)
#: The class of a model in a frame or a message, which tells no size of the model.
_CLASS: Final = re.compile(r"\b([A-Z]\w{3,60}For(?:CausalLM|ConditionalGeneration))\b")
_AUTO_MAP: Final = re.compile(r"device_map\s*[=:]\s*['\"]auto")
_VARIABLE: Final = re.compile(
    r"(?<!with )\b([A-Z][A-Z\d]*_[A-Z\d_]+)['\"]?\]?\s?=\s?['\"]?([^\s'\";&]+)"
)
#: Facts that rows of `presets/causes.yaml` use: a frame of Python's faulthandler in a linear layer;
#: an option of torch's allocator, without torch's own advice; the card and the build in torch's
#: warning; the group size of an AWQ or GPTQ checkpoint; a Jetson, by its card or its kernel;
#: the KV heads in TurboMind's config; Ascend's device or packages.
_FACTS: Final = re.compile(
    r"[/\\](?P<linear>linear\.py)\"?,? line \d+,? in forward"
    r"|(?i:alloc_conf)\S*[= \"]+\S*(?P<expandable>expandable_segments:True)(?:\s*$| [^t])"
    r"|with CUDA capability sm_(?P<arch>\d+) is not compatible"
    r"|supports CUDA capabilities (?P<built>(?:(?:sm|compute)_\d+\S* ?){1,30})"
    r"|(?:AWQ|awq|GPTQ|gptq|[Ii]nt4)[\w.]{0,99}-(?:[Gg]s?|group)-?(?P<group_size>16|32|64)\b"
    r"|(?P<jetson>\bJetson\b|\bOrin\b|-tegra\b)"
    r"|\bkv_head_num\W{1,4}(?P<kv_heads>\d+)"
    r"|(?P<ascend>--device[ =]ascend|device_type\W{1,3}ascend|[/\\]dlinfer[/\\]|\btorch_npu\b)"
)
#: Words of lines with a fact of `_FACTS`, with 0 for each digit.
_OF_FACTS: Final = re.compile(
    r"linear\.py|expandable_segments:True|CUDA capabilit|AWQ|awq|GPTQ|gptq|nt0|Jetson|Orin|-tegra"
    r"|ascend|dlinfer|torch_npu|kv_head_num"
).search
_WORDS: Final = {
    "communicator": ("nccl", "native", "cuda-ipc"),
    "dtype": ("float16", "bfloat16"),
    "model_format": ("hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"),
}
#: Packages whose printed name is not the one that Python imports.
_IMPORTED: Final = {"pytorch": "torch", "ms_swift": "swift"}
Place = tuple[int, str]


class Subject:
    """The facts of the run, collected line by line."""

    def __init__(self) -> None:
        #: Cards by chip. A name with a memory size replaces a name without a size.
        self.cards: dict[str, NamedCards] = {}
        #: The last value of each of LMDeploy's options, by name.
        self.options: dict[str, object] = {}
        #: The last value of each environment variable that the log sets.
        self.variables: dict[str, str] = {}
        self.version: str | None = None
        #: The release of each package that a line prints, by its name as Python imports it.
        self.packages: dict[str, str] = {}
        #: How many processes a launcher such as torchrun starts, and the line of its command.
        self.ranks: tuple[int, Place] | None = None
        #: The first line that sets ``device_map="auto"``.
        self.auto_map: Place | None = None
        #: The first line by which Accelerate moved weights off the cards.
        self.offloaded: Place | None = None
        #: The last class of a model that a line names.
        self.model_class = ""
        #: The last value of each fact of `_FACTS`, by name.
        self.facts: dict[str, str] = {}
        #: Names of models, each with the index of its surest place in `_MODEL`; 0 is surest.
        self.names: dict[str, int] = {}
        self.of_lmdeploy = self.quantises = self.on_pytorch = self.trains = False
        #: The name of another engine that a line shows; else empty.
        self._other = ""
        self.lines = 0

    def notice(self, text: str, form: Form) -> None:
        """Note the program and the engine that a line shows, even a line of a traceback."""
        self.of_lmdeploy = self.of_lmdeploy or form.ask(_LMDEPLOY) is not None
        self.quantises = self.quantises or form.ask(_QUANTISES) is not None
        if named := form.ask(_CLASS.search):
            # The class is cut out of the text, since the form has 0 for each digit.
            self.model_class = text[slice(*named.span(1))]
        self.on_pytorch = self.on_pytorch or form.ask(_PYTORCH) is not None
        self.trains = (self.trains and not form.ask(_SERVES)) or form.ask(_TRAINS) is not None
        if not self._other and (match := form.ask(_OTHERS)):
            self._other = str(match.lastgroup)

    @property
    def foreign(self) -> str:
        """The engine that wrote the log; empty for LMDeploy, or if no line names an engine."""
        return "" if self.of_lmdeploy else self._other

    @property
    def model(self) -> str | None:
        """The model that the log names in the surest place; None if no line names a model."""
        return min(self.names, key=lambda name: self.names[name], default=None)

    @property
    def has_versions(self) -> bool:
        """Whether the log prints the releases of LMDeploy and of torch or transformers."""
        others = not {"torch", "transformers"}.isdisjoint(self.packages)
        return others and (self.version is not None or "lmdeploy" in self.packages)

    @property
    def visible(self) -> int | None:
        """The number of cards that CUDA_VISIBLE_DEVICES names; None if the log does not set it."""
        devices = self.variables.get("CUDA_VISIBLE_DEVICES", "")
        return len(devices.split(",")) if devices.strip(",") else None

    def read(self, line: int, text: str, form: Form) -> None:
        """Read the facts in a line that is no frame of a traceback."""
        asks = form.ask(readers)
        if "names" in asks:
            self._read_names(text)
        for cards in cards_in(text) if "cards" in asks else ():
            before = self.cards.get(cards.chip, cards)
            named = before if before.sized and not cards.sized else cards
            self.cards[cards.chip] = named._replace(number=cards.number or before.number)
        if "options" in asks:
            self._read_options(text)
            if _AUTO_MAP.search(text):
                self.auto_map = self.auto_map or (line, text)
            self.variables |= dict(_VARIABLE.findall(text))
        self.offloaded = self.offloaded or ((line, text) if "offload" in asks else None)
        if "words" in asks:
            version = _VERSION.search(text.lower())
            self.version = self.version or (version and (version[1] or version[2]))
            if package := _PACKAGE.match(text.lower()):
                name = package[1].replace("-", "_")
                self.packages.setdefault(_IMPORTED.get(name, name), package[2])
            self.read_facts(text)
            if (started := _TORCHRUN.search(text)) and (ranks := _RANKS.search(started[1])):
                self.ranks = (int(ranks[1]), (line, text)) if int(ranks[1]) > 1 else self.ranks

    def _read_options(self, text: str) -> None:
        for option in _OPTION.finditer(text):
            name = option[1].replace("-", "_")
            if (value := _value(name, option[2])) is not None:
                self.options[name] = value

    def read_frame(self, path: str, text: str, form: Form) -> None:
        """Read a frame's line: its facts, and the model's folder in its path.

        A command names the model more surely than a path.
        """
        for name in filter(preset_of, names_in(path)):
            self.names.setdefault(preset_of(name) or name, len(_MODEL) + 1)
        if form.ask(may_be_fact):
            self.read_facts(text)

    def read_facts(self, text: str) -> None:
        for match in _FACTS.finditer(text):
            self.facts |= {name: value for name, value in match.groupdict().items() if value}

    def _read_names(self, text: str) -> None:
        """Note the models that a line names, each with its surest place so far."""
        found = [
            (match[1].rstrip("/"), order)
            for order, pattern in enumerate(_MODEL)
            for match in pattern.finditer(text)
        ]
        found = [(name, order) for name, order in found if "/" in name or preset_of(name)]
        found += [(name, len(_MODEL)) for name in names_in(text) if preset_of(name)]
        for name, order in found:
            key = preset_of(name) or name
            # A hub id without a preset, in a command, is surer than a mere mention of a model.
            self.names[key] = min(order, self.names.get(key, order))


def readers(form: str) -> tuple[str, ...]:
    """Return the kinds of facts that a line of this form may have; for most lines none."""
    lower = form.lower()
    kinds = {
        "names": any(pattern.search(form) for pattern in _MODEL)
        or any(map(lower.__contains__, families())),
        "cards": MAY_BE_CARD(form),
        "options": ("=" in form or "--" in form)
        and any(pattern.search(form) for pattern in (_OPTION, _AUTO_MAP, _VARIABLE)),
        "offload": _OFFLOADED.search(form),
        "words": _VERSION.search(lower)
        or _PACKAGE.match(lower)
        or _TORCHRUN.search(form)
        or may_be_fact(form),
    }
    return tuple(kind for kind, matches in kinds.items() if matches)


def may_be_fact(form: str) -> bool:
    return _OF_FACTS(form) is not None


def _value(name: str, text: str) -> object:
    """Return the value of an option from its text; None if the option cannot have that value."""
    text, share = text.rstrip("."), name == "cache_max_entry_count"
    if name in _WORDS or not re.fullmatch(r"\d*\.?\d+" if share else r"\d{1,9}", text):
        return text if text in _WORDS.get(name, ()) else None
    number = float(text) if share else int(text)
    return number if number or name == "quant_policy" else None
