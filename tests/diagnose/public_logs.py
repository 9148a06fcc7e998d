"""A public death as a log: its facts in our words and in the standard texts of torch and Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turbofit.core.presets import load_yaml

CASES: dict[str, dict[str, Any]] = load_yaml(Path(__file__).parent / "public_deaths.yaml")

_FOLDERS = {
    "site:": "/venv/lib/python3.10/site-packages/",
    "code:": "/cache/modules/transformers_modules/",
}
_PREFIXES = {
    "": "",
    "rank": "[rank0]: ",
    "compose": "llava-1  | ",
    "llava-worker": "2024-01-01 00:00:00 | ERROR | stderr | ",
    "vllm": "ERROR 01-01 00:00:00 [core.py:396] ",
    "vllm-worker": "(VllmWorkerProcess pid=67) ERROR 01-01 00:00:00 multiproc_utils.py:233] ",
    "ray": "(RayWorkerWrapper pid=69, ip=10.0.0.2) ERROR 01-01 00:00:00 [worker_base.py:620] ",
    "vllm-ranked": "(VllmWorker rank=1 pid=67) ERROR 01-01 00:00:00 [multiproc_executor.py:380] ",
    "vllm-core": "(EngineCore_DP0 pid=936) ERROR 01-01 00:00:00 [core.py:779] ",
    "vllm-core-plain": "(EngineCore_DP0 pid=494) ",
}


def log_of(case: dict[str, Any]) -> str:
    """The whole log of a case."""
    prefix = _PREFIXES[case.get("prefix", "")]
    lines = []
    for step in case["log"]:
        plain = "command" in step or "loaded" in step
        lines += [line if plain else prefix + line for line in _lines(step)]
    return "\n".join(lines) + "\n"


def _lines(step: dict[str, Any]) -> Iterator[str]:
    name = next(iter(step))
    yield from _STEPS[name](step[name], step)


def _command(text: str, _: dict[str, Any]) -> Iterator[str]:
    yield f"$ {text}"


def _loaded(shards: list[int], step: dict[str, Any]) -> Iterator[str]:
    """Progress bars of whole loads; a bar that is ``redrawn`` prints its end twice."""
    for count in shards:
        yield f"Loading checkpoint shards:   0%|          | 0/{count} [00:00<?, ?it/s]"
        for speed in ("1.00", "1.01") if step.get("redrawn") else ("1.00",):
            yield (
                f"Loading checkpoint shards: 100%|##########| {count}/{count} "
                f"[00:02<00:00,  {speed}s/it]"
            )


def _frames(frames: list[str], _: dict[str, Any]) -> Iterator[str]:
    yield "Traceback (most recent call last):"
    for frame in frames:
        place, _, call = frame.partition(" = ")
        path, function = place.rsplit(" ", 1)
        yield f'  File "{_path(path)}", line 1, in {function}'
        if call:
            yield f"    result = {call}"


def _notebook(frames: list[str], step: dict[str, Any]) -> Iterator[str]:
    """The same as IPython prints it; in a notebook the place is a link."""
    yield "OutOfMemoryError                          Traceback (most recent call last)"
    for frame in frames:
        place, _, call = frame.partition(" = ")
        path, function = place.rsplit(" ", 1)
        at = f"{_path(path)}:1"
        at = f"[{at}](http://localhost{_path(path)}#line=1)" if step.get("linked") else at
        yield f"File {at}, in {function}(self)"
        if call:
            yield f"----> 1 result = {call}"
        yield ""


def _path(text: str) -> str:
    for short, folder in _FOLDERS.items():
        if text.startswith(short):
            return folder + text.removeprefix(short)
    return f"/data/{text}"


def _torch(memory: dict[str, Any], _: dict[str, Any]) -> Iterator[str]:
    """Torch's out-of-memory text as a version writes it; a figure that is not known is left out."""
    text = memory["text"]
    lead = memory.get("lead", "torch.cuda.OutOfMemoryError: ")
    if text.startswith("device"):
        yield f"{lead}Allocation on {text}"
        return
    said = [f"{'HIP' if text == 'hip' else 'CUDA'} out of memory."]
    if "asked" in memory:
        said.append(f"Tried to allocate {memory['asked']}" + ("" if text == "2.0" else "."))
    if text == "2.0":
        said.append(
            f"(GPU {memory['gpu']}; {memory['total']} total capacity; {memory['allocated']} already"
            f" allocated; {memory['free']} free; {memory['reserved']} reserved in total by PyTorch)"
        )
    elif text != "bare":
        said += _capacity(memory)
    yield from (lead + " ".join(said)).split(" \n ")


def _capacity(memory: dict[str, Any]) -> Iterator[str]:
    cut = "\n" if memory.get("wrapped") else ""
    if "gpu" not in memory:
        yield "GPU"
        return
    capacity = "capacty" if memory["text"] == "2.1" else "capacity"
    yield (
        f"GPU {memory['gpu']} has a total {capacity} of {memory['total']} of which"
        f" {memory['free']} is free."
    )
    for pid, size in memory.get("pids", {}).items():
        if cut:
            yield cut
        yield f"Process {pid} has {size} memory in use."
    if "this" in memory:
        yield f"Including non-PyTorch memory, this process has {memory['this']} memory in use."
    if cut:
        yield cut
    if "allocated" in memory:
        said = f"Of the allocated memory {memory['allocated']} is allocated by PyTorch"
        if "pools" in memory:
            said += f", with {memory['pools']} allocated in private pools (e.g., CUDA Graphs)"
        if "cached" in memory:
            said += f", and {memory['cached']} is reserved by PyTorch but unallocated"
        yield f"{said}."


def _turbomind(fault: dict[str, Any], _: dict[str, Any]) -> Iterator[str]:
    error = (
        f"[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/utils/"
        f"{fault['where']} "
    )
    if fault.get("thrown"):
        yield "terminate called after throwing an instance of 'std::runtime_error'"
        yield f"  what():  {error}"
    else:
        yield f"RuntimeError: {error}"


def _attribute(names: list[str], step: dict[str, Any]) -> Iterator[str]:
    logged = "2024-01-01 00:00:00,000 - lmdeploy - ERROR - " if step.get("logged") else ""
    yield f"{logged}AttributeError: '{names[0]}' object has no attribute '{names[1]}'"


def _error(text: str, _: dict[str, Any]) -> Iterator[str]:
    yield from text.splitlines()


def _devices(fault: dict[str, Any], _: dict[str, Any]) -> Iterator[str]:
    operator = ""
    if "operator" in fault:
        operator = (
            f" (when checking argument for argument {fault['argument']} in method"
            f" {fault['operator']})"
        )
    yield (
        f"{fault.get('lead', 'RuntimeError: ')}Expected all tensors to be on the same device, but"
        f" found at least two devices, {' and '.join(fault['devices'])}!{operator}"
        f"{fault.get('after', '')}"
    )


_STEPS: dict[str, Callable[[Any, dict[str, Any]], Iterator[str]]] = {
    "command": _command, "loaded": _loaded, "frames": _frames, "notebook": _notebook,
    "torch": _torch, "turbomind": _turbomind, "error": _error, "attribute": _attribute,
    "devices": _devices,
}  # fmt: skip
