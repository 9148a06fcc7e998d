"""Allocations on a pretend card: what is refused, and what is counted where."""

from __future__ import annotations

import pytest

from tests.rehearsal.pretend.child import CARD, Pretend
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.pretend.usage import MALLOC, PINNED, POOL, VMM


def test_malloc_fills_and_refuses(pretend: Pretend) -> None:
    ran = pretend("""
        seen = [free()]
        a = malloc(300); seen.append(free())
        b = malloc(0.25); seen.append(free())
        seen.append(malloc(700)); seen.append(rt.cudaGetLastError())
        seen.append(rt.cudaGetErrorString(2).decode()); seen.append(rt.cudaGetLastError())
        rt.cudaFree(a); seen.append(free())
        seen.append(rt.cudaFree(void_p(12345)))
        done(seen)
        """)
    # A quarter of a MiB costs a step of 2 MiB; the error is kept once.
    assert ran.value == [900, 600, 598, 2, 2, "out of memory", 0, 898, 1]
    (death,) = ran.tagged("O")
    # What was missing is the growth (the step of 2 MiB had 1.75 left), not the size asked for.
    assert [death.number(i) for i in range(6)] == [0, MALLOC, -1, 700 * MIB, 598 * MIB, 700 * MIB]


def test_a_negative_size_fits_nowhere(pretend: Pretend) -> None:
    """As a number without a sign it is close to 2^64, and sums with it would wrap."""
    ran = pretend("""
        kept, p, seen = malloc(100), pool(2**64 - 1), []
        take(p, 100)
        for size in (2**64 - 1, 2**64 - 512, 2**64 - 100 * MIB, 2**64 - 512 * MIB):
            out, handle, props = void_p(), u64(), (ctypes.c_int * 8)(1, 0, 1, 0)
            seen += [
                rt.cudaMalloc(byref(out), size_t(size)),
                rt.cudaMallocFromPoolAsync(byref(out), size_t(size), p, None),
                rt.cudaHostAlloc(byref(out), size_t(size), 0),
                cu.cuMemCreate(byref(handle), size_t(size), props, u64(0)),
                nccl.ncclMemAlloc(byref(out), size_t(size)),
                free(),
            ]
        more = malloc(50); seen.append(free()); rt.cudaFree(kept); seen.append(free())
        out = void_p(); seen.append(rt.cudaHostAlloc(byref(out), size_t(MIB), 0))
        done(seen)
        """)
    assert ran.value == [2, 2, 2, 2, 1, 672] * 4 + [622, 722, 0]
    assert {event.number(1) for event in ran.tagged("O")} == {MALLOC, POOL, VMM}


def test_pool_step_is_a_knob(pretend: Pretend) -> None:
    code = "p = pool(2**64 - 1); a = take(p, 1); b = take(p, 32); done(free())"
    assert pretend(code).value == 900 - 64
    assert pretend(code, Scenario((CARD,), pool_step=2 * MIB)).value == 900 - 34


def test_pinned_host_memory_is_counted_apart(pretend: Pretend) -> None:
    code = """
        p, q = void_p(), void_p()
        seen = [rt.cudaHostAlloc(byref(p), size_t(40 * MIB), 0), free()]
        seen.append(rt.cudaHostAlloc(byref(q), size_t(30 * MIB), 0))
        ctypes.memset(p, 7, 4096)
        rt.cudaFreeHost(p)
        seen.append(rt.cudaHostAlloc(byref(q), size_t(30 * MIB), 0))
        done(seen)
        """
    ran = pretend(code, Scenario((CARD,), pinned_limit=64 * MIB))
    assert ran.value == [0, 900, 2, 0]
    (death,) = ran.tagged("O")
    assert (death.number(1), death.number(4)) == (PINNED, 24 * MIB)


_VMM = """
handle, at = u64(), u64()
def create(device, mib):
    props = (ctypes.c_int * 8)(1, 0, 1, device)
    return cu.cuMemCreate(byref(handle), size_t(int(mib * MIB)), props, u64(0))
def access(*devices):
    rows = (ctypes.c_int * (3 * len(devices)))(*[x for d in devices for x in (1, d, 3)])
    return cu.cuMemSetAccess(at, size_t(4 * MIB), rows, size_t(len(devices)))
seen = [create(0, 3), free()]
cu.cuMemAddressReserve(byref(at), size_t(4 * MIB), size_t(0), u64(0), u64(0))
seen.append(cu.cuMemMap(at, size_t(4 * MIB), size_t(0), handle, u64(0)))
"""


def test_vmm_memory_lives_as_long_as_handle_or_mapping(pretend: Pretend) -> None:
    code = """
seen.append(cu.cuMemRelease(handle)); seen.append(free())
ctypes.memset(at.value, 1, 4 * MIB)
seen.append(cu.cuMemUnmap(at, size_t(4 * MIB))); seen.append(free())
seen.append(cu.cuMemRelease(handle))
done(seen)
"""
    ran = pretend(_VMM + code)
    assert ran.value == [0, 896, 0, 0, 896, 0, 900, 1]
    assert ran.tagged("A")[0].number(1) == VMM


@pytest.mark.parametrize(("peers", "code"), [(None, 0), (frozenset(), 101)])
def test_peer_access_that_the_machine_lacks_fails(
    pretend: Pretend, peers: frozenset[tuple[int, int]] | None, code: int
) -> None:
    calls = """
can = ctypes.c_int()
rt.cudaDeviceCanAccessPeer(byref(can), 0, 1)
done([access(0), access(0, 1), can.value])
"""
    ran = pretend(_VMM + calls, Scenario((CARD, CARD), peers=peers))
    assert ran.value == [0, code, int(code == 0)]
    assert len(ran.tagged("X")) == (1 if code else 0)


def test_addresses_are_reused_clean_and_aligned(pretend: Pretend) -> None:
    code = """
    p = pool(2**64 - 1)
    a, b = take(p, 64), take(p, 48)
    ctypes.memset(a, 9, 4096)
    first = a.value
    rt.cudaFreeAsync(a, None)
    c = take(p, 64)
    same = c.value == first
    clean = ctypes.string_at(c.value, 4096) == bytes(4096)
    done([same, clean, b.value % (32 * MIB), c.value % (32 * MIB), take(p, 1).value % (2 * MIB)])
    """
    assert pretend(code).value == [True, True, 0, 0, 0]


#: What calls say, on one card or on the machine that stands beside them.
CALLS: dict[str, tuple[str, Scenario | None, object]] = {
    "a pool keeps its high water mark": (
        """
        p = pool(2**64 - 1)
        seen = []
        a, b = take(p, 100), take(p, 50.5); seen.append(free())
        rt.cudaFreeAsync(a, None); rt.cudaStreamSynchronize(None); seen.append(free())
        c = take(p, 70); seen.append(free())
        rt.cudaMemPoolTrimTo(p, size_t(0)); seen.append(free())
        rt.cudaFreeAsync(b, None); rt.cudaFreeAsync(c, None); rt.cudaMemPoolDestroy(p)
        seen.append(free())
        done(seen)
        """,
        None,
        [740, 740, 740, 772, 900],
    ),
    "the default pool gives back when synchronised": (
        """
        a = void_p(); seen = []
        rt.cudaMallocAsync(byref(a), size_t(64 * MIB), None); seen.append(free())
        rt.cudaFreeAsync(a, None); seen.append(free())
        rt.cudaDeviceSynchronize(); seen.append(free())
        done(seen)
        """,
        None,
        [836, 836, 900],
    ),
    "late bytes are gone once free memory was asked for": (
        "done([free(), free(), malloc(900) == 2])",
        Scenario((PretendGpu("Pretend L4", total=1000 * MIB, used=100 * MIB, late=50 * MIB),)),
        [900, 850, True],
    ),
    "nccl memory is on the account": (
        """
        p, q = void_p(), void_p()
        seen = [nccl.ncclMemAlloc(byref(p), size_t(65 * MIB)), free()]
        seen.append(nccl.ncclMemAlloc(byref(q), size_t(2000 * MIB)))
        seen += [nccl.ncclMemFree(p), free()]
        done(seen)
        """,
        None,
        [0, 834, 1, 0, 900],
    ),
    "memory is address space and small copies are real": (
        """
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        a = malloc(150 * 1024)
        host = ctypes.create_string_buffer(b"turbofit", 4 * MIB)
        back = ctypes.create_string_buffer(16)
        far = void_p(a.value + 100 * 1024 * MIB)
        rt.cudaMemcpyAsync(far, host, size_t(4096), 1, None)
        rt.cudaMemcpy(back, far, size_t(8), 2)
        small = back.value.decode()
        other = void_p(a.value + 50 * 1024 * MIB)
        rt.cudaMemcpyAsync(other, host, size_t(4 * MIB), 1, None)
        rt.cudaMemset(other, 5, size_t(64 * MIB))
        rt.cudaMemcpy(back, other, size_t(8), 2)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        done([small, back.value.decode(), grown < 8000])
        """,
        Scenario((PretendGpu("Pretend B200", total=180 * 1024 * MIB, sm=(10, 0)),)),
        ["turbofit", "", True],
    ),
    # A stand-in's experts are thousands of weights of less than 1 MiB, all zeros.
    "small copies of zeros take no host memory": (
        """
        a = malloc(512)
        zeros = ctypes.create_string_buffer(MIB)
        rt.cudaMemcpy(a, zeros, size_t(MIB), 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(512):
            rt.cudaMemcpy(void_p(a.value + i * MIB), zeros, size_t(MIB), 1)
            rt.cudaMemset(void_p(a.value + i * MIB), 0, size_t(MIB))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        words = ctypes.create_string_buffer(b"turbofit", 16)
        rt.cudaMemcpy(a, words, size_t(16), 1)
        rt.cudaMemcpy(a, zeros, size_t(4), 1)
        rt.cudaMemset(void_p(a.value + 6), ord("s"), size_t(2))
        back = ctypes.create_string_buffer(16)
        rt.cudaMemcpy(back, a, size_t(16), 2)
        done([grown < 64 * 1024, back.raw[4:8].decode()])
        """,
        None,
        [True, "ofss"],
    ),
    "pointers and properties": (
        """
        import struct
        rt.cudaSetDevice(1)
        a, host = malloc(1), ctypes.create_string_buffer(8)
        pinned, there = void_p(), void_p(); rt.cudaHostAlloc(byref(pinned), size_t(8), 0)
        kinds = []
        for p in (a, pinned, host):
            raw = ctypes.create_string_buffer(24)
            rt.cudaPointerGetAttributes(raw, p)
            kinds.append(struct.unpack_from("ii", raw.raw))
        raw = ctypes.create_string_buffer(1032)
        rt.cudaGetDeviceProperties_v2(raw, 1)
        at = lambda f, o: struct.unpack_from(f, raw.raw, o)[0]
        # offsets of name, totalGlobalMem, major, multiProcessorCount, l2CacheSize and
        # sharedMemPerBlockOptin in CUDA 12's driver_types.h
        done([kinds, raw.raw[:256].split(bytes(1))[0].decode(), at("Q", 288) // MIB, at("i", 360),
              at("i", 388), at("i", 616) // MIB, at("Q", 696) // 1024, rt.cudaSetDevice(2),
              rt.cudaHostGetDevicePointer(byref(there), pinned, 0), there.value == pinned.value])
        """,
        Scenario(
            (
                CARD,
                PretendGpu(
                    "Pretend H100", total=80 * 1024 * MIB, sm=(9, 0), sm_count=132, l2=50 * MIB
                ),
            )
        ),
        [[[2, 1], [1, 1], [0, -1]], "Pretend H100", 80 * 1024, 9, 132, 50, 227, 101, 0, True],
    ),
    "threads are held and let go": (
        """
        # Each thread counts its own steps.
        stop, more = [], threading.Condition()
        def work(mine):
            while not stop:
                with more: mine.append(1); more.notify_all()
                rt.cudaDeviceSynchronize()
                time.sleep(0.002)              # without Python's lock: it is seldom held with it
        def until(reached):
            with more: assert more.wait_for(reached, 120)
        def begin():
            mine = []
            threads.append(threading.Thread(target=work, args=(mine,)))
            threads[-1].start()
            until(lambda: len(mine) > 5)
            return mine
        threads, in_time = [], False
        # A thread that is held with Python's lock lets go by itself; the thaw says so.
        while not in_time:
            first = begin()
            held = account.pretend_freeze(120_000) == len(threads)
            before = len(first)
            begin()                            # one that comes later is not held
            during = len(first) - before
            in_time = account.pretend_thaw()
        after = len(first)
        until(lambda: len(first) > after + 5)
        stop.append(1)
        for thread in threads: thread.join()
        done([held, during])
        """,
        None,
        [True, 0],
    ),
    "without a scenario there is no device": (
        "n = ctypes.c_int(); code = rt.cudaGetDeviceCount(byref(n)); done([n.value, code])",
        Scenario(()),
        [0, 100],
    ),
    "nccl communicators split by colour and key": (
        """
        class Id(ctypes.Structure):
            _fields_ = [("data", ctypes.c_char * 128)]
        unique = Id(); nccl.ncclGetUniqueId(byref(unique))
        comms, seen = [], {}
        for rank in range(4):
            c = void_p()
            assert nccl.ncclCommInitRank(byref(c), 4, unique, rank) == 0
            comms.append(c)
        def size(c):
            n, r = ctypes.c_int(), ctypes.c_int()
            nccl.ncclCommCount(c, byref(n)); nccl.ncclCommUserRank(c, byref(r))
            return [n.value, r.value]
        def work(rank):
            half, pair = void_p(), void_p()
            assert nccl.ncclCommSplit(comms[rank], rank // 2, 0, byref(half), None) == 0
            assert nccl.ncclCommSplit(comms[rank], 0, -rank, byref(pair), None) == 0
            seen[rank] = size(half) + size(pair)
        threads = [threading.Thread(target=work, args=(r,)) for r in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        free()
        done([seen[r] for r in range(4)])
        """,
        None,
        [[2, 0, 4, 3], [2, 1, 4, 2], [2, 0, 4, 1], [2, 1, 4, 0]],
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_what_calls_say(pretend: Pretend, what: str) -> None:
    code, scenario, value = CALLS[what]
    assert pretend(code, scenario).value == value


def test_memory_that_lives_is_disjoint_aligned_and_reused(pretend: Pretend) -> None:
    code = """
        import random
        random.seed(7)
        p, live = pool(2**64 - 1), []
        for step in range(3000):
            if live and random.random() < (0.3 if step < 2000 else 0.7):
                rt.cudaFreeAsync(live.pop(random.randrange(len(live))), None)
            else:
                live.append(take(p, random.choice((0.001, 0.02, 0.4, 1.2, 3, 40)) / 4))
        done()
        """
    ran = pretend(code, Scenario((PretendGpu("Pretend card", total=1 << 40),)))
    live, begins = dict[int, int](), set[int]()
    for event in ran.events:
        if event.tag == "F":
            del live[int(event.fields[0], 16)]
        elif event.tag == "A":
            begin, size = int(event.fields[5], 16), event.number(3)
            assert begin % (2 * MIB if size >= MIB else 512) == 0
            assert all(begin + size <= other or begin >= end for other, end in live.items())
            live[begin] = begin + size
            begins.add(begin)
    assert len(live) > 100
    assert max(begins) - min(begins) < sum(e.number(3) for e in ran.tagged("A")) / 2, "reused"
