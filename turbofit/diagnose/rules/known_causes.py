"""Messages that tell their cause by themselves: pattern, what happened, why, what to change.

``{0}``, ``{1}`` … stand for the pattern's groups. Sources of the patterns: LMDeploy 0.18 (Python
and binary), torch, transformers, huggingface_hub, the kernel and the shell, as users paste them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from turbofit.diagnose.lines.events import KnownMessage
from turbofit.diagnose.rules.message import MessageRule
from turbofit.diagnose.rules.vllm_refusals import VLLM

__all__ = ["KNOWN", "said"]


def _ray_waits(pattern: str, *, passing: bool = False) -> MessageRule:
    """Ray has no GPUs for an engine: ``passing`` while it only waits, as each start may do."""
    return MessageRule(
        kind="ray_waits",
        substrings=("placement group",),
        pattern=pattern,
        phase="communication",
        what="Ray waits for GPUs that its own book-keeping does not have",
        why=(
            "LMDeploy's PyTorch engine starts tp > 1 through Ray and waits up to 1800 s for a "
            "placement group of tp GPUs; GPUs that an older Ray job holds are not free for it",
        ),
        changes=(
            "`ray stop --force` where no other job needs Ray, or set "
            "LMDEPLOY_EXECUTOR_BACKEND=mp; check CUDA_VISIBLE_DEVICES",
        ),
        rank="consequence" if passing else "cause",
        passing=passing,
    )


KNOWN: Final[tuple[MessageRule, ...]] = (
    *VLLM,
    MessageRule(
        kind="too_few_gpus",
        substrings=("no valid parallel config",),
        pattern=r"no valid parallel config: .*?tp=(\d+).*?available_devices=([^;\s]+)",
        phase="configuration",
        what="LMDeploy was asked for tp {0} and sees other GPUs than that: {1}",
        why=(
            "tp must equal the number of GPUs that the process sees, and CUDA_VISIBLE_DEVICES "
            "decides which those are",
        ),
        changes=("set --tp to the number of visible GPUs, or CUDA_VISIBLE_DEVICES to tp of them",),
        planned=True,
    ),
    MessageRule(
        kind="unsupported_model",
        substrings=("Can not found rewrite",),
        pattern=r"Can not found rewrite for architectures: \[?'?([\w', ]+?)'?\]?[.\s]*$",
        phase="configuration",
        what="this LMDeploy has no engine for the architecture {0}",
        why=(
            "TurboMind does not list it, LMDeploy falls back to its PyTorch engine, and that has "
            "no rewrite of it either",
        ),
        changes=("use a checkpoint in Hugging Face's own format (…-hf) or another engine",),
    ),
    MessageRule(
        kind="unsupported_model",
        substrings=("support has been removed from LMDeploy",),
        pattern=r"([\w.-]+) \(\w+\) support has been removed from LMDeploy",
        phase="configuration",
        what="LMDeploy no longer runs this model: {0} was removed",
        changes=("use Hugging Face Transformers for it, or an LMDeploy from before the removal",),
    ),
    MessageRule(
        kind="remote_code",
        substrings=("trust_remote_code", "trust-remote-code"),
        pattern=r"^(?!.*(?:has no effect|unexpected keyword|register remote classes))"
        r".*\b(?:set|pass|with|option|argument|execut\w+)\b.*trust[_-]remote[_-]code",
        phase="configuration",
        what="the checkpoint brings its own code, and the run was not told to trust it",
        why=("transformers refuses to execute a repository's code unless it is allowed to",),
        changes=("add --trust-remote-code (trust_remote_code=True) if you trust the repository",),
    ),
    MessageRule(
        kind="port_taken",
        substrings=("ddress already in use", "while attempting to bind", "is not available"),
        pattern=r"bind on address \('[^']*', (\d+)|(?:A|a)ddress already in use"
        r"|Port (\d+) is not available",
        phase="configuration",
        what="another program has the server's port {0}",
        why=(
            "LMDeploy binds its port only after the model is loaded, so minutes pass before it "
            "fails; often it is an earlier server that still runs and holds its GPU memory",
        ),
        changes=("stop the other server, or choose another --server-port",),
    ),
    MessageRule(
        kind="block_count",
        substrings=("cache_ratio < 1", "cache_max_block_count"),
        pattern=r"cache_ratio < 1|no longer accepts cache_max_block_count",
        phase="configuration",
        what="cache_max_entry_count was 1 or more, which LMDeploy refuses since 0.15",
        why=("older versions read such a number as a count of KV blocks; now it is only a ratio",),
        changes=("set cache_max_entry_count to a share of free memory between 0 and 1",),
        planned=True,
    ),
    MessageRule(
        kind="tp_impossible",
        substrings=("must be divisible by heads", "not divisible by tp", "symmetric buffer"),
        pattern=r"(target_heads=.*must be divisible by heads=\S+"
        r"|TP split: .*not divisible by tp=\d+"
        r"|InternViT symmetric buffer cannot hold one image tile"
        r"|QwenVit communicator requires registered symmetric buffers)",
        phase="configuration",
        what="this tp is not possible for this model with these settings: {0}",
        changes=("choose another --tp, or --communicator nccl",),
        planned=True,
    ),
    MessageRule(
        kind="no_kv_memory",
        substrings=("No enough gpu memory",),
        pattern=r"No enough gpu memory for (kv cache|runtime)",
        phase="cache",
        what="LMDeploy's PyTorch engine found no room for its {0} after the weights",
        why=(
            "it takes cache_max_entry_count of what the weights and a reserve of "
            "(max_prefill_token_num + 2 x max_batch_size) x vocabulary x 2 bytes leave",
        ),
        changes=(
            "lower --max-prefill-token-num and --max-batch-size, use more GPUs (--tp) or a "
            "quantised variant",
        ),
        planned=True,
    ),
    MessageRule(
        kind="gpu_too_old",
        substrings=("no kernel image is available", "is not compatible with the current PyTorch"),
        pattern=r"(no kernel image is available|with CUDA capability sm_\d+ is not compatible)",
        phase="configuration",
        what="the installed torch or LMDeploy has no code for this GPU: {0}",
        why=("wheels carry code for some compute capabilities only; CUDA 13 dropped Volta (V100)",),
        changes=("install a build for this GPU, e.g. torch for CUDA 12.x; see `turbofit doctor`",),
    ),
    MessageRule(
        kind="driver_too_old",
        substrings=("driver on your system is too old", "driver version is insufficient"),
        pattern=r"(?:too old \(found version (\d+)\)|driver version is (insufficient))",
        phase="configuration",
        what="the NVIDIA driver is older than the CUDA that torch was built for ({0})",
        changes=("update the driver, or install torch for an older CUDA",),
    ),
    MessageRule(
        kind="no_gpu",
        substrings=(
            "No CUDA GPUs are available",
            "Found no NVIDIA driver",
            "no CUDA-capable device",
            "libcuda.so",
        ),
        pattern=r"(No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device"
        r"|libcuda\.so(?:\.1)?: cannot open shared object file)",
        phase="configuration",
        what="CUDA sees no GPU: {0}",
        changes=("check nvidia-smi, CUDA_VISIBLE_DEVICES, and --gpus all in a container",),
    ),
    MessageRule(
        kind="no_bfloat16",
        substrings=("float16 is only supported", "fp16 is not supported"),
        pattern=r"[Bb](?:f|float)(?:loat)?16 is (?:only supported|not supported)",
        phase="configuration",
        what="this GPU has no bfloat16 (compute capability below 8.0: V100, T4)",
        changes=("use float16: --dtype float16",),
        planned=True,
    ),
    MessageRule(
        kind="gpu_lost",
        substrings=("Xid", "GPU is lost", "fallen off the bus"),
        pattern=r"(NVRM: Xid \([^)]*\): (?:79|119|120|48|63|64|94|95)\b|GPU is lost|off the bus)",
        phase="serving",
        what="the driver lost or isolated a GPU: {0}",
        why=("this is hardware, power, heat or the driver, and no setting of LMDeploy",),
        changes=("read dmesg for Xid lines, check power and cooling, restart the machine",),
    ),
    MessageRule(
        kind="host_out_of_memory",
        substrings=(
            "DefaultCPUAllocator",
            "Cannot allocate memory",
            "bad_alloc",
            "MemoryError",
            "low on memory",
            "OOM killer",
            "oom-kill",
            "memory pressure",
        ),
        pattern=r"(DefaultCPUAllocator: (?:can't allocate|not enough) memory"
        r"(?:: you tried to allocate \d+ bytes)?"
        r"|(?:\[Errno 12\]|unable to mmap .*) ?Cannot allocate memory|std::bad_alloc(?='?$)"
        r"|^MemoryError\b|node running low on memory|killed by the OOM killer"
        r"|Failed with result 'oom-kill'|Killed \S+ due to memory pressure)",
        phase="host RAM",
        what="host memory (RAM) ran out, not GPU memory: {0}",
        why=(
            "weights on their way to the GPUs, images being preprocessed and page-locked buffers of"
            " each rank take it",
        ),
        changes=("more RAM or a higher memory limit of the container; fewer replicas",),
        planned=True,
    ),
    MessageRule(
        kind="shared_memory",
        substrings=("shared memory", "/dev/shm"),
        pattern=r"(insufficient shared memory|unable to (?:open|write).*shared memory"
        r"|Error while creating shared memory segment|/dev/shm.*[Nn]o space"
        r"|[Nn]o space.*/dev/shm\S*|failed to extend /dev/shm\S*|out of shared memory)",
        phase="host RAM",
        what="/dev/shm is too small: {0}",
        why=("NCCL between GPUs without peer access, and worker processes, exchange data in it",),
        changes=("start the container with --shm-size 8g, or --ipc host",),
    ),
    MessageRule(
        kind="disk_full",
        substrings=("No space left on device",),
        pattern=r"No space left on device",
        phase="configuration",
        what="a disk is full",
        changes=("free space where the weights are (HF_HOME) or in /tmp; see `turbofit doctor`",),
    ),
    MessageRule(
        kind="no_access",
        substrings=("gated repo", "401 Client Error", "GatedRepoError", "RepositoryNotFoundError"),
        # A client's image may be refused in the same words.
        pattern=r"(gated repo|401 Client Error(?!.* for url: (?!\S*(?:huggingface|hf|/api/models)))"
        r"|GatedRepoError|RepositoryNotFoundError)",
        phase="weights",
        what="the hub refused the model: {0}",
        changes=("check the name, accept its licence on its page, and log in (HF_TOKEN)",),
    ),
    MessageRule(
        kind="no_hub",
        substrings=("LocalEntryNotFoundError", "couldn't connect to", "valid model identifier"),
        pattern=r"(LocalEntryNotFoundError|couldn't connect to '?\S+|not a valid model identifier)",
        phase="weights",
        what="the model was neither here nor could it be fetched: {0}",
        changes=("name an existing folder or hub id; check HF_ENDPOINT, HF_HUB_OFFLINE, proxies",),
    ),
    MessageRule(
        kind="package_versions",
        substrings=("Checking failed with error",),
        pattern=r"Checking failed with error (.*? has no attribute '\w+')",
        phase="configuration",
        what="LMDeploy's check of the model failed: {0}",
        why=("this LMDeploy does not know the model's kind of configuration",),
        changes=("pip install -U lmdeploy; `turbofit models` lists what the newest one runs",),
    ),
    MessageRule(
        kind="package_versions",
        substrings=("requires transformers version",),
        pattern=r"requires transformers version (\S+) but transformers (\S+) is installed",
        phase="configuration",
        what="LMDeploy's check found transformers {1}, where the model asks for {0}",
        why=("None: its config.json names no version, because LMDeploy could not read it",),
        changes=(
            "pip install -U lmdeploy, which brings a transformers that it was made for",
            "transformers_version in the checkpoint's config.json is the one it was saved with",
        ),
    ),
    MessageRule(
        kind="old_transformers",
        substrings=("does not recognize this architecture",),
        pattern=r"model type `?(\S+?)`? but Transformers does not recognize this architecture",
        phase="configuration",
        what="the installed transformers is older than the model type {0}",
        changes=("update transformers to a version that knows it",),
    ),
    MessageRule(
        kind="out_of_memory",
        substrings=("Cuda failure",),
        pattern=r"Cuda failure (?:\d+ )?'out of memory'",
        phase="communication",
        what="NCCL found no GPU memory for its buffers",
        why=("each communicator takes its buffers outside the cache and outside torch",),
        changes=("leave more beside the cache: a lower --cache-max-entry-count, or freer cards",),
        planned=True,
    ),
    MessageRule(
        kind="nccl_timeout",
        substrings=("Watchdog caught collective", "timed out after"),
        pattern=r"(Watchdog caught collective operation timeout|collective.*timed out after)",
        phase="communication",
        what="the GPUs of a group waited for each other in vain: {0}",
        why=(
            "one rank died or never came (look for its error further up), or peer access is "
            "reported but does not work (IOMMU, ACS)",
        ),
        changes=("if no other rank failed first, try NCCL_P2P_DISABLE=1; see `turbofit doctor`",),
    ),
    MessageRule(
        kind="nccl_error",
        substrings=("NCCL WARN",),
        pattern=r"NCCL WARN (.*(?:failed|error|timed? ?out).*)",
        phase="communication",
        what="NCCL complains: {0}",
        changes=("try NCCL_P2P_DISABLE=1, and NCCL_DEBUG=INFO for its reasons",),
        rank="consequence",
        passing=True,
    ),
    _ray_waits(
        r"(Cannot provide a placement group"
        r"|placement group .*(?:timed out|not (?:ready|enough)|infeasible))"
    ),
    _ray_waits(r"[Ww]aiting for creating a placement group", passing=True),
    MessageRule(
        kind="engine_gone",
        substrings=("inference engine is unavailable", "ENGINE_STOP_ERROR"),
        pattern=r"inference engine is unavailable|ENGINE_STOP_ERROR",
        phase="serving",
        what="the engine is dead while its port still answers",
        why=("LMDeploy's PyTorch engine does not outlive an error in a forward pass",),
        changes=("restart it; the first error above it is the cause",),
        rank="consequence",
    ),
    MessageRule(
        kind="aborted",
        substrings=("134", "bort", "-6", "ABRT"),
        pattern=r"(?:[Ee]xit\w*(?:[\s:=(\"]|with|[Cc]ode|status)*(?:134|-6)\b|status=6/ABRT"
        r"|Exited \(134\)|Aborted(?: \(core dumped\)| *$)|Signal 6 \(SIGABRT\)|SIGABRT)",
        phase="unknown",
        what="the process aborted (SIGABRT, exit code 134)",
        why=(
            "TurboMind aborts on each failed CUDA call, out of memory most often; the line that "
            "says which comes before the abort",
        ),
        changes=("send the log from its start, with TM_LOG_LEVEL=INFO",),
        rank="consequence",
    ),
    MessageRule(
        kind="shared_memory",
        substrings=("Bus error",),
        pattern=r"Bus error(?: \(core dumped\)| *$)",
        phase="host RAM",
        what="the process died of a bus error (SIGBUS)",
        why=("most often /dev/shm is full, which NCCL and worker processes exchange data in",),
        changes=("start the container with --shm-size 8g, or --ipc host",),
        rank="consequence",
    ),
    MessageRule(
        kind="killed",
        substrings=("137", "Killed", "OOMKilled", "-9", "status=9/KILL"),
        pattern=r"(?:[Ee]xit\w*(?:[\s:=(\"]|with|[Cc]ode|status)*(?:137|-9)\b|status=9/KILL"
        r"|Exited \(137\)|OOMKilled(?!\"?[:=] ?\"?false)|(?:^|\s)Killed *$|Signal 9 \(SIGKILL\))",
        phase="host RAM",
        what="the process was killed from outside (SIGKILL, exit code 137)",
        why=(
            "most often the kernel or the container's memory limit: host RAM ran out, not GPU "
            "memory",
        ),
        changes=("look into dmesg, or raise the container's memory limit",),
        rank="consequence",
    ),
    MessageRule(
        kind="halved_prefill",
        substrings=("Update max_prefill_token_num",),
        pattern=r"No enough memory. Update max_prefill_token_num=(\d+)",
        phase="cache",
        what="LMDeploy's PyTorch engine lowered max_prefill_token_num to {0} by itself",
        rank="notice",
    ),
    MessageRule(
        kind="no_such_gpu",
        substrings=("invalid device ordinal",),
        pattern=r"invalid device ordinal",
        phase="configuration",
        what="a GPU was addressed that the process does not see",
        changes=("compare CUDA_VISIBLE_DEVICES with --tp and with nvidia-smi",),
    ),
)


@cache
def _compiled() -> tuple[re.Pattern[str], tuple[re.Pattern[str], ...]]:
    substrings = "|".join(re.escape(word) for known in KNOWN for word in known.substrings)
    return re.compile(substrings), tuple(re.compile(known.pattern) for known in KNOWN)


def said(text: str) -> KnownMessage | None:
    """The first known message in a line, or None."""
    any_word, patterns = _compiled()
    if not any_word.search(text):
        return None
    for index, (known, pattern) in enumerate(zip(KNOWN, patterns, strict=True)):
        if any(word in text for word in known.substrings) and (match := pattern.search(text)):
            groups = tuple(group for group in match.groups() if group)
            return KnownMessage(place=index, detail=groups)
    return None
