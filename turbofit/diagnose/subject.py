"""What a log says about the run itself: model, cards, options, version, launcher."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from turbofit.diagnose.foreign import ForeignPrograms
from turbofit.diagnose.rules.causes import caught
from turbofit.machine.presets import find_preset as find_gpu
from turbofit.machine.presets import nominal_gigabytes
from turbofit.model.presets import find_preset as find_model
from turbofit.model.presets import known_presets

_NAME = r"['\"]?([\w./~-]*[A-Za-z][\w./-]*)['\"]?"
#: Where commands and code name a model, surest first.
_MODEL: Final = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\bapi_server\s+{_NAME}",
        rf"\blmdeploy\s+(?:chat|serve\s+\w+)\s+{_NAME}",
        rf"--model(?:[-_]path|[-_]name[-_]or[-_]path|[-_]dir|[-_]base|s)?[ =]{_NAME}",
        rf"\b(?:pipeline|from_pretrained|resolve_model)\(\s*{_NAME}",
        rf"\b(?:model_path|model_name_or_path|pretrained_model_name_or_path|model)\s*[=:]\s*{_NAME}",
        rf"--checkpoint[ =]{_NAME}",
        rf"\bturbofit (?:serve|plan|predict|rehearse) {_NAME}",
        rf"\bvllm serve {_NAME}|['\"]model(?:_tag)?['\"]: {_NAME}",
    )
)
#: Names of models that presets know by another. The original LLaVA and its LoRA count as the
#: checkpoint that they become: `turbofit merge` makes it.
_SPELLINGS: Final = (
    (r"llava-?v?1[.-]5-7b|llava-7b", "llava-1.5-7b"),
    (r"llava-?v?1[.-]5-13b", "llava-1.5-13b"),
    (r"llava-?onevision.*7b", "llava-onevision-7b"),
    (r"cogvlm2", "cogvlm2-19b"),
    (r"cogvlm", "cogvlm-17b"),
    (r"llama-?3[.-]2-11b-vision", "llama-3.2-11b-vision"),
)
#: Words that logs of inference on GPUs have, and other programs' logs have not.
_INFERENCE: Final = re.compile(
    r"lmdeploy|turbomind|turbofit|vllm|sglang|transformers|torch|cuda|nvidia|nccl|nvml|nvrm|ptxas|xformers"
    r"|triton|flash[-_]?(?:attn|attention|infer)|huggingface|hf[-_]mirror|modelscope|safetensors"
    r"|bitsandbytes|\[tm\]|raylet|\bray\b|\bgpu|\bllms?\b|tokenizer|api_server"
    r"|attempting to bind on address|server socket has failed|\.(?:h|cc):\d+ warn "
    r"|trust[-_]remote|inference engine"
    r"|intern(?:vl|vit|lm)|qwen|llava|cogvlm|llama|mixtral"
)
#: `lmdeploy lite`, by its command or by its frames: advice and plans are for serving.
_QUANTISES: Final = re.compile(r"\blmdeploy lite \w|[/\\]lmdeploy[/\\]lite[/\\]")
_CARDS: Final = ("RTX", "Tesla", "NVIDIA", "V100", "A100", "H100", "H200", "L4", "T4", "A10")
_TOKEN: Final = re.compile(r"[\w./-]*[A-Za-z][\w.-]*\d[\w.-]*")
#: A card's size after its name, and no machine's: "A100 80G", "RTX 4090 (24 GB)".
_SIZE: Final = r"\d{1,3}(?:\.\d+)? ?[Gg](?:i?[Bb])?"
_CARD_SIZE: Final = (
    rf"(?P<size>s?,?(?: with| of| GPUs?| cards?)?[ _:/-]{{0,2}}[(\[]? ?(?:{_SIZE}|\d{{4,6}} ?MiB)\b"
    r"[)\]]?(?! *(?:of |system |host |CPU )?(?:RAM|DDR|free|used|swap|disk|SSD)))?"
)
#: Before a number that says which card, and not how many.
_NO_INDEX: Final = r"(?<![.:|] )(?<!GPU )(?<!evice )(?<!ank )(?<!ode )(?<!CUDA )(?<![.\d])"
_MANY: Final = {"two": 2, "four": 4, "eight": 8}
_CARD: Final = re.compile(
    rf"(?:\b(?P<count>\d{{1,2}})\s*[x×*]\s*|{_NO_INDEX}\b(?P<many>[2-8]|two|four|eight) )?"
    r"(?:\b(?P<before>\d{2,3} ?[Gg][Bb]?)[ -])?"
    r"(?P<name>(?:NVIDIA\s+)?(?:GeForce\s+)?RTX\s?\d{4}(?:\s?D\b)?(?:\s?Ti)?(?:\s?SUPER)?"
    r"(?:\sLaptop)?"
    r"|Tesla\s+[A-Z]\d{1,3}(?:-\w+)*|V100(?:-\w+)*(?:[ -]\d\dGB?)?"
    r"|NVIDIA\s+[A-Z]{1,2}\d{1,4}(?:[ -](?:SXM\d?|PCIe|PCIE|\d\dGB|HBM3))*"
    r"|\b[AH]100(?!\d)(?:-\w+)*|H200|\bL4\b|L40S|\bT4\b|\bA10\b)"
    rf"{_CARD_SIZE}(?:\s?[x×*]\s?(?P<times>\d)\b)?",
)
_HAS_SIZE: Final = re.compile(r"\d\dG")
_CHIP: Final = re.compile(r"RTX ?\d{4}|[A-Z]{1,2}\d{1,4}")
#: People round what a card has, or name what CUDA can use of it.
_ROUNDED: Final = 0.1
_OPTION: Final = re.compile(
    r"(?:--|\b)(cache[-_]max[-_]entry[-_]count|max[-_]prefill[-_]token[-_]num|max[-_]batch[-_]size"
    r"|session[-_]len|quant[-_]policy|cache[-_]block[-_]seq[-_]len|communicator|dtype"
    r"|model[-_]format|tp)(?:\s*=\s*|\s+)['\"]?([\w.-]+)"
)
_ASYNC: Final = re.compile(r"(?:--async[ =]|\basync_=)([01])\b")
_VERSION: Final = re.compile(
    r"lmdeploy(?:[=:~ <>]+|\S* version:? )v?(\d+\.\d+(?:\.\w+)*)"
    r"|lmdeploy[-_](\d+\.\d+\.\d+)\S*\.whl",
    re.IGNORECASE,
)
_TORCHRUN: Final = re.compile(r"(?:torchrun|torch\.distributed\.run|accelerate launch)\b(.*)")
_RANKS: Final = re.compile(r"--(?:nproc[-_]per[-_]node|num[-_]processes)[ =](\d+)")
_WORLD: Final = re.compile(r"\bWORLD_SIZE[ =:]+(\d+)")
_AUTO_MAP: Final = re.compile(r"device_map\s*[=:]\s*['\"]auto")
_WHOLE: Final = ("max_prefill_token_num", "max_batch_size", "session_len", "quant_policy", "tp",
                 "cache_block_seq_len")  # fmt: skip

Place = tuple[int, str]


class FactCollector:
    """Collects, row by row; each fact keeps the line it was read from."""

    def __init__(self) -> None:
        self.cards: dict[str, tuple[int, Place]] = {}
        #: Cards that a line names and no preset knows: what is known of the others is no machine.
        self.unknown_cards: dict[str, Place] = {}
        #: Chips that the log names with a size, and cards of others: a name leaves its size open.
        self._sized = set[str]()
        self._unsized: dict[str, str] = {}
        self.options: dict[str, object] = {}
        self.version: str | None = None
        self.ranks: tuple[int, Place] | None = None
        self.auto_map: Place | None = None
        self.foreign = ForeignPrograms()
        #: Whether a checkpoint was quantised, and nothing served.
        self.quantises = False
        #: Whether the log is about inference at all: what other programs say is nobody's cause.
        self.of_inference = False
        #: A model that a command or a dump of settings names, and that no preset is for.
        self.unknown_model: str | None = None
        self.names: dict[str, tuple[int, Place]] = {}
        #: What the rows of `facts` in `presets/causes.yaml` caught, the last line of each.
        self.facts: dict[str, str] = {}
        #: Whether a line names LMDeploy, by whatever word.
        self.names_lmdeploy = False

    @property
    def of_lmdeploy(self) -> bool:
        return self.foreign.of_lmdeploy or self.names_lmdeploy

    def notice(self, text: str) -> None:
        """Notice of any text of the log, a frame's path too, what it is about and what ran."""
        self.of_inference = self.of_inference or _INFERENCE.search(text.lower()) is not None
        self.foreign.notice(text)
        if "lite" in text and _QUANTISES.search(text):
            self.quantises = True

    def read(self, line: int, text: str) -> None:
        place = (line, text)
        lower = text.lower()
        if any(word in lower for word in _families()):
            self._model(place)
        for card in _CARD.finditer(text) if any(word in text for word in _CARDS) else ():
            self._card(card, place)
        if "=" in text or "--" in text:
            self._options(place)
        if "lmdeploy" in lower:
            self.names_lmdeploy = True
            match = _VERSION.search(text)
            self.version = self.version or (match and (match[1] or match[2]))
        self._launcher(place)
        self.facts.update(caught(text))

    @property
    def model(self) -> tuple[str, Place] | None:
        """The model's name as turbofit knows it, and where; the surest kind of place wins."""
        if not self.names:
            return None
        name = min(self.names, key=lambda name: self.names[name][0])
        return name, self.names[name][1]

    def _card(self, match: re.Match[str], place: Place) -> None:
        """A card by its preset; by its words where their size or form is none of the preset's."""
        name = re.sub(r"\s+", " ", match["name"])
        plain = find_gpu(name.removesuffix(" Laptop"))
        if plain is None:
            self.unknown_cards.setdefault(name, place)
            return
        written = match["size"] or match["before"] or ""
        many = match["many"] or match["count"] or match["times"] or 0
        count = _MANY.get(str(many)) or int(many)
        size, key = _sized(name, plain, written, count)
        if self._is_news(
            _CHIP.findall(name)[0], key, sized=bool(size or _HAS_SIZE.search(name))
        ) and (key not in self.cards or count):
            self.cards[key] = (count, place)

    def _is_news(self, chip: str, key: str, *, sized: bool) -> bool:
        """Whether a card is none of those before; one with a size takes the bare name's place."""
        if sized:
            self._sized.add(chip)
            self.cards.pop(self._unsized.pop(chip, ""), None)
        elif chip in self._sized:
            return False
        else:
            self._unsized[chip] = key
        return True

    def _model(self, place: Place) -> None:
        text = place[1]
        for order, pattern in enumerate(_MODEL):
            for match in pattern.finditer(text):
                name = next(group for group in match.groups() if group)
                self._name(name, order, place)
                if self.unknown_model is None and "/" in name and _known_model(name) is None:
                    self.unknown_model = name
        for match in _TOKEN.finditer(text):
            self._name(match[0], len(_MODEL), place)

    def _name(self, name: str, order: int, place: Place) -> None:
        known = _known_model(name)
        if known is not None and order < self.names.get(known, (len(_MODEL) + 1, place))[0]:
            self.names[known] = (order, place)

    def _options(self, place: Place) -> None:
        for option in _OPTION.finditer(place[1]):
            name = option[1].replace("-", "_")
            value = _value(name, option[2])
            if value is not None:
                self.options[name] = value
        if match := _ASYNC.search(place[1]):
            self.options["async_"] = int(match[1])
        if _AUTO_MAP.search(place[1]):
            self.auto_map = self.auto_map or place

    def _launcher(self, place: Place) -> None:
        text = place[1]
        if match := _TORCHRUN.search(text):
            count = _RANKS.search(match[1])
            if count and int(count[1]) > 1:
                self.ranks = (int(count[1]), place)
        if (match := _WORLD.search(text)) and int(match[1]) > 1:
            self.ranks = self.ranks or (int(match[1]), place)


def _sized(name: str, plain: str, written: str, count: int) -> tuple[int, str]:
    """A card's size in GB as it is written, 0 where none is, and the name with it."""
    size, nominal = _gigabytes(written), nominal_gigabytes(plain)
    sized = f"{name} {size}GB" if size else name
    # Behind a comma it may be the machine's; else it may be of all cards together.
    if find_gpu(sized) is None and ("," in written or size == count * nominal):
        size, sized = 0, name
    same = size and abs(size - nominal) <= nominal * _ROUNDED
    return size, find_gpu(sized) or (plain if same else sized)


@cache
def _families() -> tuple[str, ...]:
    """What the names of models begin with: most lines are passed over by it."""
    words = {match[0] for name in known_presets() if (match := re.match("[a-z]+", name))}
    return tuple(sorted(words | {"cogvlm", "llava", "llama"}))


def _gigabytes(text: str) -> int:
    """The size of a card as it is written, in GB; 0: none is."""
    number = re.search(r"[\d.]+", text)
    if number is None:
        return 0
    return round(float(number[0]) / (1024 if "M" in text else 1))


def preset_of(name: str) -> str | None:
    """The preset that a name in a log means, or None."""
    plain = name.lower().replace("_", "-")
    for pattern, preset in _SPELLINGS:
        if re.search(pattern, plain):
            return preset
    return find_model(name)


def _known_model(name: str) -> str | None:
    """The same for a name that may be a folder's."""
    last = name.rstrip("/").rpartition("/")[2]
    return preset_of(name) or preset_of(last)


def _value(name: str, text: str) -> object:
    """An option's value; None for what cannot be one."""
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
