"""Processes that share pretend cards: contexts, forks, and ends."""

from __future__ import annotations

import subprocess

import pytest

from tests.rehearsal.pretend.child import CARD, Machine, ask, tell
from tests.rehearsal.pretend.conftest import MachineOf
from tests.support.waiting import HANG
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.process_memory import ProcessMemory
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.pretend.usage import CONTEXT, timeline_is_full


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.communicate(timeout=HANG)
        assert process.returncode == 0


def test_two_processes_share_a_card(machine: Machine) -> None:
    code = """
    a = malloc(400); say([free(), a != 2]); wait()
    b = malloc(300); say([free(), b != 2]); wait()
    """
    one = machine.start(code)
    assert ask(one) == [500, True]
    two = machine.start(code)
    assert ask(two) == [100, True]
    tell(one)
    assert ask(one) == [100, False]
    (seen, other) = machine.shared.processes
    assert (seen.allocated[0], other.allocated[0]) == (400 * MIB, 400 * MIB)
    assert seen.refused_at > 0
    assert other.refused_at == 0
    tell(one)
    end(one)
    tell(two)
    assert ask(two) == [200, True]  # what a dead process held is free at once
    tell(two)
    end(two)
    shared = machine.shared
    assert [p.alive for p in shared.processes] == [False, False]
    assert shared.peak[0] == 800 * MIB
    assert [p.at_peak[0] for p in shared.processes] == [400 * MIB, 400 * MIB]
    assert shared.processes[1].peak[0] == 700 * MIB
    (death,) = [e for e in machine.timeline(one.pid) if e.tag == "O"]
    assert [death.number(i) for i in range(6)] == [0, 0, -1, 300 * MIB, 100 * MIB, 300 * MIB]


def test_killed_while_it_holds_the_lock(machine: Machine) -> None:
    """The lock's owner dies between its slot and the sum: the next one counts anew."""
    code = """
    malloc(100)
    import mmap
    with open(os.environ["SHARED"], "r+b") as f:
        m = mmap.mmap(f.fileno(), 0)
    at = (ctypes.c_char * len(m)).from_buffer(m)
    libc = ctypes.CDLL(None)
    lock = 16 + 3 * 17 * 8
    assert libc.pthread_mutex_lock(byref(at, lock)) == 0
    ctypes.c_uint64.from_buffer(m, 16).value = 12345  # a sum that nobody finished
    say(1)
    os.kill(os.getpid(), 9)
    """
    process = machine.start(code, SHARED=str(machine.folder / "shared"))
    ask(process)
    process.communicate()
    assert process.returncode == -9
    assert machine.run("say([free(), malloc(900) != 2])") == [900, True]


def test_four_processes_never_exceed_a_card(machine_of: MachineOf) -> None:
    """Whoever looks, at any time: the living hold no more than the card has; sums come back."""
    card = PretendGpu("Pretend L4", total=256 * MIB, used=16 * MIB)
    machine = machine_of(Scenario((card,), context=8 * MIB, timeline_limit=4 << 20))
    code = """
    import random
    import select
    rng, kept, refused, told = random.Random(int(os.environ["SEED"])), [], 0, False
    while not (told and refused):
        told = told or bool(select.select([sys.stdin], [], [], 0)[0])
        if kept and rng.random() < 0.45:
            rt.cudaFree(kept.pop(rng.randrange(len(kept))))
        else:
            p = malloc(rng.choice((0.5, 2, 7, 19, 40)))
            if p == 2: refused += 1
            else: kept.append(p)
    for p in kept: rt.cudaFree(p)
    say([refused > 0, account.pretend_held(0)])
    """
    running = [machine.start(code, SEED=str(seed)) for seed in range(4)]
    looks = peak = 0
    while looks < 500 or peak <= 200 * MIB:
        shared = machine.shared
        assert shared.held(0) <= 240 * MIB + 3 * 40 * MIB  # unlocked
        peak = shared.peak[0]
        assert peak <= 240 * MIB
        looks += 1
    for process in running:
        tell(process)
        assert process.stdout is not None
        assert process.stdout.read().strip() == "[true, 0]"
        end(process)
    assert machine.shared.peak[0] <= 240 * MIB
    assert machine.run("say(free())") == 232


def test_a_context_is_charged_to_each_process_and_card(machine_of: MachineOf) -> None:
    cards = (CARD, PretendGpu("Small", total=300 * MIB))
    machine = machine_of(Scenario(cards, context=250 * MIB, timeline_limit=1 << 20))
    one = machine.start("count(); say(1); wait(); say([free(), free()]); wait()")
    ask(one)
    assert not any(machine.shared.processes[0].context)  # counting cards uses none
    tell(one)
    assert ask(one) == [650, 650]
    code = """
    seen = [free(), account.pretend_context(1), account.pretend_context(1)]
    rt.cudaSetDevice(1)
    say(seen + [free(), account.pretend_held(1)]); wait()
    """
    two = machine.start(code)
    assert ask(two) == [400, 0, 0, 50, 0]
    three = machine.start(
        "say([rt.cudaSetDevice(1), malloc(10), account.pretend_context(1)]); wait()"
    )
    assert ask(three) == [2, 2, 2]
    lines = machine.timeline(two.pid)
    made = [[e.number(i) for i in range(3)] for e in lines if e.tag == "K"]
    assert made == [[0, 250 * MIB, 400 * MIB], [1, 250 * MIB, 50 * MIB]]
    deaths = [e for e in machine.timeline(three.pid) if e.tag == "O"]
    assert [d.number(1) for d in deaths] == [CONTEXT] * 3
    assert [d.number(4) for d in deaths] == [50 * MIB] * 3
    for process in (one, two, three):
        tell(process)
    end(one, two, three)


# On device 1 where a call sets it, else on the current one.
@pytest.mark.parametrize(
    ("call", "cards"),
    [
        ("rt.cudaSetDevice(1)", [1]),  # as from CUDA 12.0 on
        ("rt.cudaHostAlloc(byref(void_p()), size_t(4096), 0)", [0]),
        ("rt.cudaStreamCreate(byref(void_p()))", [0]),
        ("rt.cudaEventCreateWithFlags(byref(void_p()), 2)", [0]),
        ("rt.cudaFree(None)", [0]),
        ("rt.cudaDeviceSynchronize()", [0]),
        ("cu.cuDevicePrimaryCtxRetain(byref(void_p()), 1)", [1]),
        ("cu.cuDevicePrimaryCtxGetState(1, byref(ctypes.c_uint()), byref(ctypes.c_int()))", []),
        ("rt.cudaGetDevice(byref(ctypes.c_int()))", []),
    ],
)
def test_what_needs_a_context_makes_it(machine_of: MachineOf, call: str, cards: list[int]) -> None:
    machine = machine_of(Scenario((CARD, CARD), context=250 * MIB, timeline_limit=1 << 20))
    code = f"""
    {call}
    def active(device):
        n = ctypes.c_int()
        cu.cuDevicePrimaryCtxGetState(device, byref(ctypes.c_uint()), byref(n))
        return n.value
    say([active(0), active(1)])
    """
    assert machine.run(code) == [int(card in cards) for card in range(2)]
    (process,) = machine.shared.processes
    assert process.context[:2] == tuple(250 * MIB * (card in cards) for card in range(2))


# What `cuCtxGetCurrent` says of this thread: a context is its device and one, NULL is 0.
@pytest.mark.parametrize(
    ("calls", "current"),
    [
        ("cu.cuInit(0)", 0),
        ("rt.cudaGetDevice(byref(ctypes.c_int()))", 0),
        ("cu.cuDevicePrimaryCtxRetain(byref(void_p()), 1)", 0),
        ("rt.cudaSetDevice(1)", 2),
        ("rt.cudaFree(None)", 1),
        ("cu.cuCtxSetCurrent(void_p(2))", 2),
        ("rt.cudaSetDevice(1); cu.cuCtxSetCurrent(None)", 0),
        ("in_a_thread(lambda: rt.cudaSetDevice(1))", 0),
    ],
)
def test_a_context_is_current_where_a_thread_made_it_so(
    machine_of: MachineOf, calls: str, current: int
) -> None:
    machine = machine_of(Scenario((CARD, CARD), context=250 * MIB))
    code = f"""
    def in_a_thread(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    {calls}
    found, device = void_p(99), ctypes.c_int(99)
    say([cu.cuCtxGetCurrent(byref(found)), found.value or 0, cu.cuCtxGetDevice(byref(device))])
    """
    invalid_context = 201
    assert machine.run(code) == [0, current, 0 if current else invalid_context]


THREE = tuple(PretendGpu(f"Card {i}", total=(i + 1) * 100 * MIB) for i in range(3))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("1,7,0", [1]),
        ("1,1", []),
        ("nothing", []),
        ("2x,0", [2, 0]),
        ("GPU-3c6ef362,GPU-9e", [1, 0]),
        ("gpu-9e", []),
        ("GPU-9e3779b1-7072-6574-656e-642067707500,1", [0]),
    ],
)
def test_visible_devices(machine_of: MachineOf, value: str | None, shown: list[int]) -> None:
    machine = machine_of(Scenario(THREE, timeline_limit=1 << 20))
    env = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    code = """
    at = account.pretend_physical
    say([count(), [at(i) for i in range(count())], at(count())])
    """
    assert machine.run(code, **env) == [len(shown), shown, -1]


def test_ordinals_are_the_processes_own(machine_of: MachineOf) -> None:
    machine = machine_of(Scenario(THREE, peers=frozenset({(0, 2), (2, 0)}), timeline_limit=1 << 20))
    code = """
    def can(a, b):
        n = ctypes.c_int(); rt.cudaDeviceCanAccessPeer(byref(n), a, b); return n.value
    a, pinned = malloc(10), ctypes.c_int(); device = ctypes.c_int()
    account.pretend_locate(a, byref(device), byref(pinned))
    say([os.getpid(), free(), device.value, can(0, 1), can(1, 0), rt.cudaSetDevice(2), uuid_of(0)])
    """
    pid, free, device, *can, error, uuid = machine.run(code, CUDA_VISIBLE_DEVICES="2,0")
    assert (free, device, can, error) == (290, 0, [1, 1], 101)
    assert uuid == machine.run("say(uuid_of(2))")
    assert machine.shared.processes[0].allocated[:3] == (0, 0, 10 * MIB)
    head, _, given, *_ = machine.timeline(pid)
    assert (head.tag, head.fields[2]) == ("I", "2,0")
    assert (given.tag, given.number(0)) == ("A", 2)


def test_a_child_of_fork_has_its_own(machine_of: MachineOf) -> None:
    machine = machine_of(Scenario(THREE, timeline_limit=1 << 20))
    code = """
    p = pool(2**64 - 1)
    rt.cudaSetDevice(0)
    rows = [malloc(28), take(p, 32)]
    child = os.fork()
    if not child:
        os.environ["CUDA_VISIBLE_DEVICES"] = "2,0"
        seen = [account.pretend_held(0), account.pretend_held(1), count()]
        rt.cudaSetDevice(1); seen.append(free())          # physical 0: the parent's 60 are gone
        rt.cudaFree(rows[0]); rt.cudaFreeAsync(rows[1], None)  # its copies: nothing of ours
        seen += [free(), malloc(30) != 2, free(), account.pretend_held(1) // MIB]
        say([os.getpid(), *seen]); os._exit(0)
    os.waitpid(child, 0)
    rt.cudaFree(rows[0])
    say([os.getpid(), account.pretend_held(0) // MIB, free()])
    """
    process = machine.start(code)
    child, *seen = ask(process)
    assert seen == [0, 0, 2, 40, 40, True, 10, 30]
    assert ask(process) == [process.pid, 32, 68]
    end(process)
    parent_lines, child_lines = machine.timeline(process.pid), machine.timeline(child)
    assert child_lines[0].fields == (str(child), str(process.pid), "2,0")
    assert child_lines[1].fields[0].split()[1:3] == ["-S", "-c"]
    assert [e.number(3) for e in child_lines if e.tag == "A"] == [30 * MIB]
    assert [e.number(3) for e in parent_lines if e.tag == "A"] == [28 * MIB, 32 * MIB]


FORKS = {
    "while other threads allocate": """
    stop = []
    def work():
        while not stop: rt.cudaFree(malloc(1))
    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    codes = []
    for _ in range(20):
        child = os.fork()
        if not child:
            os._exit(0 if malloc(5) != 2 else 1)
        codes.append(os.waitpid(child, 0)[1])
    stop.append(1); [t.join() for t in threads]
    say([sum(codes), free()])
    """,
    "while another thread begins": """
    def forks_at_once():
        thread = threading.Thread(target=malloc, args=(1,))
        thread.start()
        child = os.fork()
        if not child:
            os._exit(0 if malloc(5) != 2 else 1)
        code = os.waitpid(child, 0)[1]
        thread.join()
        return code
    codes = []
    for _ in range(60):
        child = os.fork()
        if not child:
            os._exit(1 if forks_at_once() else 0)
        codes.append(os.waitpid(child, 0)[1])
    say([sum(codes), free()])
    """,
}


@pytest.mark.parametrize("when", FORKS)
def test_a_fork_at_any_time_is_safe(machine: Machine, when: str) -> None:
    assert machine.run(FORKS[when]) == [0, 900]


def test_exec_begins_anew_under_the_same_pid(machine: Machine) -> None:
    code = """
    if len(sys.argv) < 2:
        malloc(300)
        words = open("/proc/self/cmdline").read().split("\\0")[:-1]
        os.execv(sys.executable, [*words, "again"])
    say([os.getpid(), free()])
    """
    pid, free = machine.run(code)
    assert free == 900
    assert machine.timelines() == {f"{pid}.timeline", f"{pid}-1.timeline"}


def test_without_a_shared_file_each_process_has_its_own_machine(machine: Machine) -> None:
    folder = machine.folder
    (folder / "scenario").write_text(Scenario((CARD,)).text(f"{folder}/timelines/"))
    code = """
    malloc(300)
    child = os.fork()
    if not child:
        say([free(), account.pretend_held(0)]); os._exit(0)
    os.waitpid(child, 0); say(free())
    """
    process = machine.start(code)
    assert (ask(process), ask(process)) == ([900, 0], 600)
    end(process)
    assert not (folder / "shared").exists()


def test_the_nth_allocations_of_a_machine_fail(machine_of: MachineOf) -> None:
    machine = machine_of(Scenario((CARD,), fail_at=3, fail_pinned_at=2))
    code = """
        p = pool()
        seen = [isinstance(one, int) for one in (malloc(1), take(p, 1), malloc(1))]
        out = void_p()
        for n in range(2):
            seen.append(rt.cudaHostAlloc(byref(out), size_t(4096), 0))
        memory = ctypes.create_string_buffer(4096)
        seen.append(rt.cudaHostRegister(memory, size_t(4096), 0))
        say([os.getpid(), seen])
        """
    pid, seen = machine.run(code)
    assert seen == [False, False, True, 0, 2, 0]
    # Counted over both processes: the second one's first is the fourth of the machine.
    assert machine.run(code)[1] == [False, False, False, 0, 0, 0]
    assert (machine.shared.allocations, machine.shared.pinned_allocations) == (6, 6)
    device, pinned = (e for e in machine.timeline(pid) if e.tag == "E")
    assert [device.number(i) for i in (0, 1, 3, 5)] == [0, 0, MIB, 3]
    assert (pinned.number(1), pinned.number(5)) == (3, 2)
    (first, second) = ProcessMemory(1, None, MIB).read([device, pinned]).deaths
    assert (first["simulated"], first["missing"], second["simulated"]) == (3, None, 2)


def test_a_process_survives_a_disk_without_room_for_its_timeline(machine: Machine) -> None:
    """A page that the file does not have is refused by the kernel as a page without a block is."""
    code = f"""
        path = f"{machine.folder}/timelines/{{os.getpid()}}.timeline"
        malloc(1); os.truncate(path, 4096)
        for _ in range(200):
            rt.cudaFree(malloc(1))
        say([os.getpid(), free()])
        """
    pid, left = machine.run(code)
    assert left == 898
    path = machine.folder / "timelines" / f"{pid}.timeline"
    assert timeline_is_full(path)
    assert 3072 < path.stat().st_size <= 4096
    assert ProcessMemory(1, None, MIB).read(machine.timeline(pid)).cards[0].peak == {
        "start": 2 * MIB
    }
