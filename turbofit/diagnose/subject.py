"""Finds the facts about the run itself: model, cards, options, version, launcher."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

from turbofit.diagnose.foreign import ForeignPrograms
from turbofit.diagnose.rules.causes import caught, facts_in
from turbofit.machine.card_words import CardWords
from turbofit.model.presets import find_preset as find_model
from turbofit.model.presets import known_presets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.observe.log_reader import Form

_NAME = r"['\"]?([\w./~-]*[A-Za-z][\w./-]*)['\"]?"
#: Places where commands and code name a model; the surest place is first.
_MODEL: Final = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b(?:api_server|lmdeploy\s+(?:chat|serve\s+\w+)|vllm serve"
        rf"|turbofit (?:serve|plan|predict|rehearse))\s+{_NAME}",
        r"--(?:model(?:[-_]path|[-_]name[-_]or[-_]path|[-_]dir|[-_]base|s)?|checkpoint)"
        rf"[ =]{_NAME}",
        rf"\b(?:pipeline|from_pretrained|resolve_model)\(\s*{_NAME}",
        rf"\b(?:model_path|model_name_or_path|pretrained_model_name_or_path|model)\s*[=:]\s*{_NAME}",
        rf"['\"]model(?:_tag)?['\"]: {_NAME}",
    )
)
#: Names of models that have another name in the presets. The original LLaVA and its LoRA stand for
#: the checkpoint that `turbofit merge` makes of them.
_SPELLINGS: Final = (
    (r"llava-?v?1[.-]5-7b|llava-7b", "llava-1.5-7b"),
    (r"llava-?v?1[.-]5-13b", "llava-1.5-13b"),
    (r"llava-?onevision.*7b", "llava-onevision-7b"),
    (r"cogvlm2", "cogvlm2-19b"),
    (r"cogvlm", "cogvlm-17b"),
    (r"llama-?3[.-]2-11b-vision", "llama-3.2-11b-vision"),
)
#: Words in logs of inference on GPUs that other programs' logs do not have.
_INFERENCE: Final = re.compile(
    r"(?i:lmdeploy|turbomind|turbofit|vllm|sglang|transformers|torch|cuda|nvidia|nccl|nvml|nvrm|ptxas|xformers"
    r"|triton|flash[-_]?(?:attn|attention|infer)|huggingface|hf[-_]mirror|modelscope|safetensors"
    r"|bitsandbytes|\[tm\]|raylet|\bray\b|\bgpu|\bllms?\b|tokenizer|api_server"
    r"|attempting to bind on address|server socket has failed|\.(?:h|cc):\d+ warn "
    r"|trust[-_]remote|inference engine"
    r"|intern(?:vl|vit|lm)|qwen|llava|cogvlm|llama|mixtral|minicpm|chatglm|deepseek|mistral)"
).search
#: `lmdeploy lite`, by its command or by its frames: advice and plans are for serving.
_QUANTISES: Final = re.compile(r"\blmdeploy lite \w|[/\\]lmdeploy[/\\]lite[/\\]").search
#: A path or a name; its parts; and CogVLM, the one family that people name without a number.
_TOKEN: Final = re.compile(r"[\w./-]+")
_LETTER: Final = re.compile("[A-Za-z]")
_DIGIT: Final = re.compile(r"\d")
_COGVLM: Final = re.compile(r"\b[Cc][Oo][Gg]VLM\b")
_OPTION: Final = re.compile(
    r"(?:--|\b)(cache[-_]max[-_]entry[-_]count|max[-_]prefill[-_]token[-_]num|max[-_]batch[-_]size"
    r"|session[-_]len|quant[-_]policy|cache[-_]block[-_]seq[-_]len|communicator|dtype"
    r"|model[-_]format|tp)(?:\s*=\s*|\s+)['\"]?([\w.-]+)"
)
#: The release, in a text of small letters.
_VERSION: Final = re.compile(
    r"lmdeploy(?:(?:[=:~ <>]+|\S* version:? )v?(\d+\.\d+(?:\.\w+)*)"
    r"|[-_](\d+\.\d+\.\d+)\S*\.whl)",
    re.ASCII,
)
#: Words before a release that somebody should install.
_WISHED: Final = re.compile(r"(?:upgrad|updat|升级|更新|降级).{0,16}lmdeploy")
_TORCHRUN: Final = re.compile(r"(?:torchrun|torch\.distributed\.run|accelerate launch)\b(.*)")
_RANKS: Final = re.compile(r"--(?:nproc[-_]per[-_]node|num[-_]processes)[ =](\d+)")
_AUTO_MAP: Final = re.compile(r"device_map\s*[=:]\s*['\"]auto")
_WHOLE: Final = ("max_prefill_token_num", "max_batch_size", "session_len", "quant_policy", "tp",
                 "cache_block_seq_len")  # fmt: skip

Place = tuple[int, str]


class FactCollector:
    """Collects facts row by row; each fact keeps the line from which it was read."""

    def __init__(self) -> None:
        self.cards = CardWords()
        self.options: dict[str, object] = {}
        self.version: str | None = None
        self.ranks: tuple[int, Place] | None = None
        self.auto_map: Place | None = None
        self.foreign = ForeignPrograms()
        #: Whether a checkpoint was quantised and no model was served.
        self.quantises = False
        #: Whether the log is about inference at all: otherwise its lines prove no cause.
        self.of_inference = False
        #: A model that a command or a dump of settings names, and that has no preset.
        self.unknown_model: str | None = None
        self.names: dict[str, tuple[int, Place]] = {}
        #: The text that each row of `facts` in `presets/causes.yaml` matched last.
        self.facts: dict[str, str] = {}

    @property
    def of_lmdeploy(self) -> bool:
        return self.foreign.of_lmdeploy or self.foreign.names_lmdeploy

    def notice(self, text: str, form: Form, *, by_person: bool = False) -> None:
        """Read any text of the log, also a frame's path, for its topic and its program."""
        self.of_inference = self.of_inference or form.ask(_INFERENCE) is not None
        self.quantises = self.quantises or form.ask(_QUANTISES) is not None
        self.foreign.notice(text, form, by_person=by_person)

    def read(self, line: int, text: str, form: Form) -> None:
        self.cards.read(line, text)
        for read in form.ask(_readers):
            read(self, (line, text))

    @property
    def model(self) -> tuple[str, Place] | None:
        """The model's name in turbofit and its place; the surest kind of place wins."""
        if not self.names:
            return None
        name = min(self.names, key=lambda name: self.names[name][0])
        return name, self.names[name][1]

    def _model(self, place: Place) -> None:
        text = place[1]
        for order, pattern in enumerate(_MODEL):
            for match in pattern.finditer(text):
                self._name(match[1], order, place)
                if self.unknown_model is None and "/" in match[1] and not _known_model(match[1]):
                    self.unknown_model = match[1]
        for name in _names_in(text):
            self._name(name, len(_MODEL), place)

    def _name(self, name: str, order: int, place: Place) -> None:
        known = _known_model(name)
        if known is not None and order < self.names.get(known, (len(_MODEL) + 1, place))[0]:
            self.names[known] = (order, place)

    def _version(self, place: Place) -> None:
        text = place[1].lower()
        match = None if _WISHED.search(text) else _VERSION.search(text)
        self.version = self.version or (match and (match[1] or match[2]))

    def _facts(self, place: Place) -> None:
        self.facts.update(caught(place[1]))

    def _options(self, place: Place) -> None:
        for option in _OPTION.finditer(place[1]):
            name = option[1].replace("-", "_")
            value = _value(name, option[2])
            if value is not None:
                self.options[name] = value
        if _AUTO_MAP.search(place[1]):
            self.auto_map = self.auto_map or place

    def _launcher(self, place: Place) -> None:
        text = place[1]
        if match := _TORCHRUN.search(text):
            count = _RANKS.search(match[1])
            if count and int(count[1]) > 1:
                self.ranks = (int(count[1]), place)


def _readers(form: str) -> tuple[Callable[[FactCollector, Place], None], ...]:
    """The functions that may read a line, by its words; for most lines an empty list."""
    lower = form.lower()
    options = ("=" in form or "--" in form) and any(
        pattern.search(form) for pattern in (_OPTION, _AUTO_MAP)
    )
    named = any(pattern.search(form) for pattern in _MODEL) or any(_names_in(form))
    names = named and any(map(lower.__contains__, _families()))
    reads = {
        FactCollector._model: names,
        FactCollector._options: options,
        FactCollector._version: _VERSION.search(lower),
        FactCollector._launcher: "run" in form or "launch" in form,
        FactCollector._facts: facts_in(form),
    }
    return tuple(read for read, words in reads.items() if words)


def _names_in(text: str) -> Iterator[str]:
    """Yields names with a number, each as a path up to the last part that has one."""
    for token in _TOKEN.findall(text):
        parts = token.split("/")
        while parts and not _is_numbered(parts[-1]):
            parts.pop()
        if parts:
            yield "/".join(parts)
    yield from _COGVLM.findall(text)


def _is_numbered(part: str) -> bool:
    """Whether a letter is followed by a digit, next to it or later."""
    letter = _LETTER.search(part)
    return letter is not None and _DIGIT.search(part, letter.end()) is not None


def may_have_facts(form: str) -> bool:
    """Whether a line of this form may tell a fact other than a card or a program."""
    return bool(_readers(form))


@cache
def _families() -> tuple[str, ...]:
    """The beginnings of model names; a line without any of them is skipped."""
    words = {match[0] for name in known_presets() if (match := re.match("[a-z]+", name))}
    words |= {"cogvlm", "llava", "llama"}
    return tuple(word for word in words if not any(word.startswith(o) for o in words - {word}))


@lru_cache(1024)
def preset_of(name: str) -> str | None:
    """The preset that a name in a log means, or None."""
    plain = name.lower().replace("_", "-")
    for pattern, preset in _SPELLINGS:
        if re.search(pattern, plain):
            return preset
    return find_model(name)


def _known_model(name: str) -> str | None:
    """The preset of a name that may be a folder's, or None."""
    last = name.rstrip("/").rpartition("/")[2]
    return preset_of(name) or preset_of(last)


def _value(name: str, text: str) -> object:
    """An option's value; None for a text that is no possible value."""
    text = text.rstrip(".")
    try:
        if name in _WHOLE:
            number = int(text)
            return number if 0 < number < 1 << 30 or name == "quant_policy" else None
        if name == "cache_max_entry_count":
            return float(text)
    except ValueError:
        return None
    allowed = {
        "communicator": ("nccl", "native", "cuda-ipc"),
        "dtype": ("float16", "bfloat16"),
        "model_format": ("hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"),
    }
    return text if text in allowed.get(name, ()) else None
