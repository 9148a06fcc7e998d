"""Makes command lines for every preset model, card, option and older LMDeploy.

Choices are drawn by the case's own name (`random.Random(name)`), so that a new preset adds its
cases and changes no other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import yaml

PRESETS = Path(__file__).resolve().parents[2] / "presets"
_NO_PRESETS = {"aliases", "context", "unsupported"}

#: Small ones, large ones, some in use, several, unequal, joined, with a host, measured.
MACHINES = (
    "1xrtx3060", "1xrtx3090", "1xl4", "1xl4:free=19GiB", "1xt4", "1xa100-80g", "1xh200",
    "1xv100-32g", "2xrtx3090", "2xrtx4090", "4xrtx3090", "4xl4", "8xrtx2080ti", "2xrtx3090,p2p=all",
    "4xrtx3090,nvlink=0-1+2-3", "rtx3090+rtx4090", "2xrtx3090:used=3GiB+1xl4", "8xh100",
    "4xa100-40g,ram=16GiB", "3xa6000", "2xrtx5090:total=30GiB", "1xb200",
    "desk.json", "four.json", "pairs.json", "eight.json", "container.json", "little-ram.json",
    "unequal.json", "old.json", "measured.json", "measured-pairs.json", "calibrated.json",
    "chosen.json", "slices.json",
)  # fmt: skip
#: Several cards, on which large models fit as well.
LARGE = (
    "8xa100-80g", "4xl40s", "8xh100", "4xrtx3090", "4xa100-40g", "8xrtx4090",
    "eight.json", "four.json", "pairs.json", "unequal.json", "measured.json", "measured-pairs.json",
)  # fmt: skip
#: One of each family, engine and way of taking images; quantised ones; several sizes.
TILES = ("internvl2-8b", "internvl2-26b-awq", "internvl3-8b-hf", "internvl3.5-30b-a3b")
PIXELS = ("qwen2-vl-7b", "qwen2.5-vl-7b-awq", "qwen3-vl-8b", "qwen3.5-9b", "glm-4.1v-9b")
OTHERS = (
    "llava-1.5-7b", "cogvlm-17b", "glm-4v-9b", "gemma-3-4b", "llama-4-scout", "phi-3.5-vision",
)  # fmt: skip
#: Planned for Transformers.
FALLBACK = ("llava-v1.6-mistral-7b", "llava-onevision-7b", "llama-3.2-11b-vision")
TEXT = ("qwen2.5-7b", "qwen3-30b-a3b", "llama-3.1-8b", "mixtral-8x7b", "qwen3-32b-awq")
_ALL = (*TILES, *PIXELS, *OTHERS, *FALLBACK, *TEXT)
_Space = dict[str, tuple[str | bool, ...]]
_Words = dict[str, str | bool]
#: What each option may be; True: it has no value. Options of one kind of model or engine below.
VALUES: _Space = {
    "--revision": ("main",),
    "--gpus": ("0", "0,1", "1"),
    "--tp": ("1", "2", "4"),
    "--replicas": ("1", "2", "3"),
    "--engine": ("auto", "turbomind", "pytorch", "transformers"),
    "--images": ("0", "1", "2", "5"),
    "--image-size": ("448x448", "1920x1080", "300x4000", "4096x4096"),
    "--context": ("2048", "8192", "16384", "32768"),
    "--concurrency": ("1", "3", "32", "256"),
    "--goal": ("throughput", "latency", "context"),
    "--queue-images": (True,),
    "--margin": ("0", "512MiB", "2%", "10%"),
    "--budget": ("10GiB", "20GiB", "40GiB"),
    "--cache-max-entry-count": ("0.2", "0.5", "0.8", "0.95"),
    "--max-prefill-token-num": ("512", "2048", "8192", "16384"),
    "--max-batch-size": ("1", "4", "64", "256"),
    "--session-len": ("1024", "4096", "32768"),
    "--dtype": ("auto", "float16", "bfloat16"),
    "--quant-policy": ("0", "4", "int8"),
    "--cache-block-seq-len": ("32", "64", "128"),
    "--model-format": ("hf", "awq"),
    "--enable-prefix-caching": (True,),
    "--language-model-only": (True,),
}
TILE_VALUES: _Space = {"--max-dynamic-patch": ("1", "6", "12", "24")}
PIXEL_VALUES: _Space = {"--max-pixels": ("262144", "1003520", "4000000")}
TURBOMIND_VALUES: _Space = {
    "--communicator": ("nccl", "native", "cuda-ipc"),
    "--async": ("0", "1"),
}
PYTORCH_VALUES: _Space = {
    "--eager-mode": (True,),
    "--num-gpu-blocks": ("64", "1000"),
    "--adapters": ("sql=sql-lora",),  # no folder is there
    "--hf-overrides": ('{"max_position_embeddings":65536}', '{"hidden_size":1}'),
    "--cudagraph-capture-batch-sizes": ("1 2 4", "8"),
    "--distributed-executor-backend": ("uni", "mp", "ray"),
    "--quant-policy": ("8", "16", "17"),
}
PREDICT_VALUES: _Space = {
    "--lmdeploy": ("0.18", "0.16.0"),
    "--free-at-cache": ("3GiB", "12GiB"),
}
#: Where accounts of older ones begin, versions between them, the newest.
VERSIONS = (
    "0.0.14", "0.1.0", "0.2.2", "0.2.6", "0.3.0", "0.4.0", "0.4.2", "0.5.0", "0.5.1", "0.5.3",
    "0.6.0", "0.6.2", "0.6.4", "0.7.0", "0.8.0", "0.9.0", "0.9.2", "0.10.0", "0.12.0", "0.15.0",
    "0.16.0", "0.17.0", "0.18", "0.18.1", "0.19.0",
)  # fmt: skip
_OLDER = ("internvl2-8b", "qwen2-vl-7b", "llava-1.5-7b")
_FOR_OLDER = ("1xrtx3090", "4xrtx3090 --tp 4", "2xa100-40g --tp 2", "old.json")
#: What Transformers' plans have no use for.
LMDEPLOY_ONLY = frozenset(VALUES) - {
    "--revision", "--gpus", "--tp", "--replicas", "--engine", "--images", "--image-size",
    "--context", "--concurrency", "--goal", "--margin", "--budget", "--session-len", "--dtype",
}  # fmt: skip
#: Cases of each option, one of its values after the other.
_ROUNDS = 7
_FORMS = ("--json", "--json", "--json", "", "--md")


def models() -> Iterator[str]:
    """Yield lines of each preset model, on a random machine and on a large one."""
    for name in _presets("models"):
        chance = random.Random(f"model {name}")
        yield f"plan {name} --on {chance.choice(MACHINES)} {chance.choice(_FORMS)}"
        command, large = chance.choice(("plan", "predict")), chance.choice(LARGE)
        yield f"{command} {name} --on {large} --json"


def cards() -> Iterator[str]:
    """Yield lines of each preset card, alone or with others of its kind."""
    for name in _presets("gpus"):
        chance = random.Random(f"card {name}")
        for command, kinds in (("plan", _ALL), ("predict", (*TILES, *PIXELS, *OTHERS, *TEXT))):
            count, model = chance.choice((1, 1, 2, 4, 8)), chance.choice(kinds)
            yield f"{command} {model} --on {count}x{name} {chance.choice(_FORMS)}"


def checkpoints() -> Iterator[str]:
    """Yield lines of each folder of `inputs`, whose models are read from config.json."""
    text = Path(__file__).with_name("checkpoints.yaml").read_text(encoding="utf-8")
    for name in yaml.safe_load(text):
        if not name.startswith("bad-"):
            chance = random.Random(f"checkpoint {name}")
            machine = chance.choice(("1xrtx3090", "2xrtx4090", "eight.json"))
            yield f"plan ./{name} --on {machine} --json"
            yield f"predict ./{name} --on 1xa100-80g --json"


def generations() -> Iterator[str]:
    """Yield lines of each older LMDeploy in `VERSIONS`, for both engines."""
    for version in VERSIONS:
        chance = random.Random(f"generation {version}")
        for model in ("llama-2-7b", *chance.sample(_OLDER, 2)):
            machine = chance.choice(_FOR_OLDER)
            free = chance.choice(("", "", " --free-at-cache 4GiB"))
            yield f"predict {model} --on {machine} --lmdeploy {version}{free} --json"
        yield f"predict internvl2-8b --on 2xrtx3090 --engine pytorch --lmdeploy {version} --json"


def options() -> Iterator[str]:
    """Yield lines of each option with each of its values, and up to three random others."""
    every = (VALUES, TILE_VALUES, PIXEL_VALUES, TURBOMIND_VALUES, PYTORCH_VALUES, PREDICT_VALUES)
    for number, space in enumerate(every):
        for option, values in space.items():
            for turn in range(max(_ROUNDS, len(values))):
                chance = random.Random(f"option {number} {option} {turn}")
                model, engine = _model(chance, space, option)
                yield _line(chance, model, engine, {option: values[turn % len(values)]})


def _line(chance: random.Random, model: str, engine: str, words: _Words) -> str:
    """Return a line with the option in ``words`` and random others that do not override it."""
    option = next(iter(words))
    command = "predict" if option in PREDICT_VALUES or chance.random() < 0.3 else "plan"
    if model in FALLBACK:
        command, engine = "plan", ""
    if engine and option != "--engine":
        words["--engine"] = engine
    space = _space(model, engine, command)
    for other in chance.sample(sorted(space), chance.randrange(4)):
        if not _clashes(other, words):
            words[other] = chance.choice(space[other])
    given = " ".join(name if held is True else f"{name} {held}" for name, held in words.items())
    several = not {"--tp", "--replicas", "--gpus"}.isdisjoint(words)
    machine = chance.choice(LARGE if several else MACHINES)
    return f"{command} {model} --on {machine} {given} {chance.choice(_FORMS)}"


def _space(model: str, engine: str, command: str) -> _Space:
    """Return the options that go with a model, an engine and a command."""
    space = dict(VALUES)
    if model in FALLBACK:
        return {name: held for name, held in space.items() if name not in LMDEPLOY_ONLY}
    if command == "predict":
        space |= PREDICT_VALUES
    if model in TILES:
        space |= TILE_VALUES
    if model in PIXELS:
        space |= PIXEL_VALUES
    if model in TEXT:
        del space["--image-size"]
    if engine == "pytorch":
        space |= PYTORCH_VALUES
    if engine == "turbomind":
        space |= TURBOMIND_VALUES
    return space


def _clashes(option: str, words: _Words) -> bool:
    """Return whether an option contradicts one in ``words``, or has cases of its own."""
    if option in words or option in ("--engine", "--revision", "--model-format"):
        return True
    pairs = (
        {"--session-len", "--context"}, {"--image-size", "--language-model-only"},
        {"--tp", "--replicas"}, {"--tp", "--gpus"}, {"--replicas", "--gpus"},
    )  # fmt: skip
    return any(option in pair and not pair.isdisjoint(words) for pair in pairs)


def _model(chance: random.Random, space: _Space, option: str) -> tuple[str, str]:
    """Return a model for which an option of this space has a meaning, and the engine to ask for."""
    if space is TILE_VALUES:
        return chance.choice(TILES), ""
    if space is PIXEL_VALUES:
        return chance.choice(PIXELS), ""
    if space is TURBOMIND_VALUES:
        return chance.choice((*TILES, *PIXELS[:2], *TEXT)), "turbomind"
    if space is PYTORCH_VALUES:
        return chance.choice((*PIXELS, *OTHERS, *TEXT)), "pytorch"
    if option in ("--image-size", "--queue-images"):
        return chance.choice((*TILES, *PIXELS, *OTHERS)), ""
    if option in LMDEPLOY_ONLY or space is PREDICT_VALUES:
        return chance.choice((*TILES, *PIXELS, *OTHERS, *TEXT)), chance.choice(("", "", "pytorch"))
    return chance.choice(_ALL), ""


def _presets(kind: str) -> list[str]:
    found = (path.stem for path in (PRESETS / kind).glob("*.yaml"))
    return sorted(name for name in found if name not in _NO_PRESETS)
