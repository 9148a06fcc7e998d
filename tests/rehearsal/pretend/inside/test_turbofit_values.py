"""A CUDA build of torch on pretend GPUs: its own allocator and errors, real control values."""

from __future__ import annotations

import re

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, HEAD, Ran, run
from tests.sweep import part

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")]
MIB = 1 << 20

#: Each small tensor, told by the card and by the CPU: a fifth of them in the check, which is every
#: kind with every shape and every call.
TOLD = """
import itertools, os
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SHAPES = [(), (1,), (5,), (0,), (3, 4), (2, 0), (2, 3, 4)]
CALLS = {
    "repr": repr,
    "format": lambda x: f"{x}",
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero().tolist(),
    "where": lambda x: [part.tolist() for part in torch.where(x != 0)],
    "masked_select": lambda x: torch.masked_select(x, x != 0).tolist(),
    "mask": lambda x: x[x != 0].tolist(),
    "unique": lambda x: torch.unique(x).tolist(),
    "consecutive": lambda x: torch.unique_consecutive(x).tolist(),
    "sum": lambda x: repr(x.sum()),
    "mean": lambda x: repr(x.to(torch.float32).mean()),
    "graph": lambda x: repr((x.float().clone().requires_grad_() * 2).mean()),
}

def told(call, x):
    try:
        text = str(call(x))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return type(error).__name__
    words = "".join(text.replace("device='cuda:0'", "").split())
    return words.replace(",,", ",").replace(",)", ")")

def small():
    drawn, wrong = 0, []
    torch.manual_seed(0)
    kinds = [*FLOATS, *EIGHT, *WHOLE, torch.complex64]
    every = 1 if os.environ.get("CHECK_ALL") else 5
    for dtype, shape, name in itertools.islice(
        itertools.product(kinds, SHAPES, CALLS), 0, None, every
    ):
        values = torch.randn(shape) * 3
        host = (values > 0 if dtype is torch.bool else values).to(dtype)
        of_both = [told(CALLS[name], x) for x in (host, host.cuda())]
        drawn += 1
        if of_both[0] != of_both[1]:
            wrong.append([str(dtype), shape, name, *of_both])

    big, refused = torch.randn(1 << 20, device="cuda"), []
    for call in (torch.nonzero, torch.unique):
        try:
            call(big)
        except RuntimeError as error:
            refused.append([type(error).__name__, str(error)])
    uploaded = torch.unique(torch.arange(1 << 18, dtype=torch.float32).cuda()).numel()
    return [drawn, wrong, refused, uploaded]
"""

PROGRAM = """
import os, subprocess, threading
import triton, triton.language as tl

def agree():
    before = torch.cuda.mem_get_info()
    x = torch.empty(1 << 28, device="cuda")
    after = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    del x; torch.cuda.empty_cache()
    return {"allocated": allocated, "free": [before[0], after[0]],
            "name": torch.cuda.get_device_name(), "total": before[1]}

def steer():
    d, out = "cuda", {}
    x = torch.arange(10, device=d)
    mask = torch.zeros(3, 4, device=d, dtype=torch.bool); mask[1] = True
    out["masked"] = x[x > 4].tolist()
    out["nonzero"] = mask.nonzero().tolist()
    out["item"] = [(x * 2).sum().item(), x.float().mean().item(), bool(mask.any())]
    out["scan"] = torch.cumsum(torch.ones(5, device=d, dtype=torch.int32), 0).tolist()
    out["unique"] = torch.unique(torch.tensor([3, 1, 3], device=d)).tolist()
    y = torch.zeros(4, device=d); y[torch.tensor([True, False, True, False], device=d)] = 7.0
    out["put"] = y.tolist()
    out["cast"] = torch.tensor([1.5, 2.5], device=d).to("cpu", torch.float64).tolist()
    out["prod"] = torch.tensor([2, 3, 7], device=d).prod().item()
    with torch.inference_mode():
        out["inference"] = x[x > 7].tolist()
    out["argmax"] = torch.randn(8, 151936, device=d, dtype=torch.bfloat16).argmax(-1).tolist()
    def inside(): out["thread"] = torch.arange(5, device=d)[torch.tensor([0, 4], device=d)].tolist()
    thread = threading.Thread(target=inside); thread.start(); thread.join()
    rows, columns = torch.meshgrid(x[:2] * 1.0, x[:3] * 1.0, indexing="ij")
    out["grid"] = [rows.tolist(), columns.tolist()]
    return out

def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(128, 64),
        torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8),
    ).bfloat16()
    image = torch.randn(2, 3, 16, 16).bfloat16()
    with torch.inference_mode():
        expected = net(image)
        found = net.cuda()(image.cuda()).cpu()
    return bool((expected == found).all())

def large():
    half = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.empty(1, 32, 2048, 128, **half)
    attended = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    conv = torch.nn.Conv2d(3, 1024, 14, 14, **half)(torch.empty(4, 3, 448, 448, **half))
    wide = torch.nn.Linear(4096, 11008, **half)(torch.empty(2048, 4096, **half))
    graph, a = torch.cuda.CUDAGraph(), torch.zeros(64, 64, device="cuda")
    with torch.cuda.graph(graph): b = a @ a
    graph.replay(); torch.cuda.synchronize()
    return [list(attended.shape), list(conv.shape), list(wide.shape), list(b.shape)]

def child():
    code = (
        "import sys, torch; x = torch.empty(1 << 20, device='cuda');"
        "print(torch.cuda.device_count(), torch.cuda.get_device_properties(0).uuid,"
        " 'torch._dynamo' in sys.modules)"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    seen = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return [torch.cuda.device_count(), seen.stdout.split(),
            str(torch.cuda.get_device_properties(1).uuid)]

@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n) + 1, at < n)

@triton.jit
def product(x, y, SIDE: tl.constexpr, LONG: tl.constexpr):
    at, along = tl.arange(0, SIDE), tl.arange(0, LONG)
    one = tl.load(x + at[:, None] * LONG + along[None, :])
    two = tl.load(x + along[:, None] * SIDE + at[None, :])
    tl.store(y + at[:, None] * SIDE + at[None, :], tl.dot(one, two))

def kernels():
    x = torch.zeros(1 << 20, device="cuda")
    kernel = add[(8,)](x, x, 1024, BLOCK=128)
    try:
        product[(1,)](x, x, SIDE=16, LONG=2048)
    except triton.runtime.errors.OutOfResources as exc:
        return [kernel.metadata.target.arch, str(exc)]

def files():
    storage = torch.UntypedStorage.from_file(__file__, False, os.path.getsize(__file__))
    mapped = torch.asarray(storage, dtype=torch.uint8)  # as safetensors reads a weight
    return [mapped.data_ptr() == storage.data_ptr(), triton.runtime.cache.triton_key()]

parts = (agree, steer, network, large, child, kernels, files, small)
result({part.__name__: part() for part in parts})

torch.cuda.empty_cache()
def weights():
    return torch.empty(10 << 30, dtype=torch.uint8, device="cuda")
keep = weights()
more = torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One program, since importing torch and its first call are most of each one's work."""
    folder = tmp_path_factory.mktemp("torch")
    made = run(folder, TOLD + PROGRAM, on="2xrtx3090", TRITON_CACHE_DIR=str(folder / "triton"))
    assert made.code == 1, made.text  # its last line runs out of memory
    assert made.result, made.text
    return made


def test_torch_and_the_account_agree(ran: Ran) -> None:
    seen = ran.result["agree"]
    assert seen["allocated"] == 1 << 30
    before, after = seen["free"]
    assert before - after == 1 << 30
    assert seen["name"] == "NVIDIA GeForce RTX 3090"
    # The context is gone before anything was allocated.
    assert seen["total"] - before == ran.report["processes"][0]["gpus"][0]["context"] > 0
    # Out of memory is torch's own, and its line is told.
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB." in ran.text
    assert re.search(r"\b10\.\d\d GiB is allocated by PyTorch", ran.text)
    refused = ran.report["refused"]
    assert refused["asked"] == 20 << 30
    assert refused["left"] < 14 << 30
    assert refused["short"] == refused["asked"] - refused["left"]
    last = (TOLD + PROGRAM).rstrip().count("\n") + HEAD.count("\n") + 1
    assert f"program.py:{last} <module>" in refused["site"]
    assert ran.report["processes"][0]["gpus"][0]["peak"] >= 10 << 30


def test_what_programs_steer_by_is_computed_and_large_work_is_not(ran: Ran) -> None:
    assert ran.result["steer"] == {
        "grid": [[[0, 0, 0], [1, 1, 1]], [[0, 1, 2], [0, 1, 2]]],
        "masked": [5, 6, 7, 8, 9],
        "nonzero": [[1, 0], [1, 1], [1, 2], [1, 3]],
        "item": [90, 4.5, True],
        "scan": [1, 2, 3, 4, 5],
        "unique": [1, 3],
        "put": [7.0, 0.0, 7.0, 0.0],
        "cast": [1.5, 2.5],
        "prod": 42,
        "inference": [8, 9],
        "argmax": [0] * 8,
        "thread": [0, 4],
    }
    # A small network gives what it gives on a CPU.
    assert ran.result["network"] is True
    # Attention, convolution, products and a graph: torch asks its libraries as on a real card.
    assert ran.result["large"] == [[1, 32, 2048, 128], [4, 1024, 32, 32], [2048, 11008], [64, 64]]
    assert "CUDA Graph is empty" not in ran.text


def test_children_kernels_and_files_are_those_of_the_card(ran: Ran) -> None:
    both, seen, second = ran.result["child"]
    assert (both, seen) == (2, ["1", second, "False"])  # nor has it imported Dynamo for us
    parent = ran.report["processes"][0]["pid"]
    children = [p for p in ran.report["processes"] if p["parent"] == parent]
    assert [d["gpu"] for p in children for d in p["gpus"] if d["peak"]] == [1]
    # Triton compiles for the card, and refuses what it has not.
    arch, message = ran.result["kernels"]
    assert arch == 86
    assert "shared memory" in message
    assert "Hardware limit: 101376" in message
    # Neither weights, which torch would copy where operations are watched, nor Triton's compiler.
    shared, compiler = ran.result["files"]
    assert shared
    assert "libtriton.so" in compiler


def test_small_tensors_are_told_as_the_cpu_tells_them(ran: Ran) -> None:
    """A length that is made of uncomputed values is refused in words, not by an allocation."""
    drawn, wrong, refused, uploaded = ran.result["small"]
    assert drawn > part(1000, 5)
    assert not wrong
    assert [kind for kind, _ in refused] == ["RuntimeError"] * 2
    assert all("1,048,576 elements is not known" in text for _, text in refused)
    assert uploaded == 1 << 18
