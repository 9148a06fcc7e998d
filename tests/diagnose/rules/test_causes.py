"""`presets/causes.yaml`: what a row takes for its message, and what it computes from the log."""

from __future__ import annotations

import re

import pytest

from tests.diagnose.conftest import explain
from turbofit.core.units import GIB
from turbofit.diagnose.rules.causes import causes, fact_patterns
from turbofit.diagnose.rules.figures import FIGURES

ARCHES = "The current PyTorch install supports CUDA capabilities {}.\n"
CARD = "{} with CUDA capability {} is not compatible with the current PyTorch installation.\n"
NO_KERNEL = "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
VLLM = (
    "INFO 02-26 09:54:05 worker.py:267] the current vLLM instance can use total_gpu_memory"
    " ({}GiB) x gpu_memory_utilization (0.70) = 16.80GiB\n"
    "INFO 02-26 09:54:05 worker.py:267] model weights take {}GiB; non_torch_memory takes 0.10GiB;"
    " PyTorch activation peak memory takes 2.40GiB; the rest of the memory reserved for KV Cache is"
    " {}GiB.\n"
    "ValueError: No available memory for the cache blocks. Try increasing"
    " `gpu_memory_utilization` when initializing the engine.\n"
)
LONGEST = (
    "ValueError: To serve at least one request with the models's max seq len (65536), (7.50 GiB KV"
    " cache is needed, which is larger than the available KV cache memory (6.25 GiB). Based on the"
    " available memory, the estimated maximum model length is 54608. Try increasing"
    " `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."
)


@pytest.mark.parametrize(
    "line",
    [
        "INFO 03-01 10:00:01 [core.py:58] Initializing a V1 LLM engine (v0.9.1) with config:"
        " model='/m/a', tokenizer='/m/a', trust_remote_code=False, dtype=torch.float16",
        "Launching model qwen2 with following model config: {'model_path': '/m', 'tp': 2,"
        " 'trust_remote_code': True, 'device': 'cuda'}",
        "args: Namespace(model='a', tp=2, trust_remote_code=True, port=8000)",
        "The argument `trust_remote_code` is to be used with Auto classes. It has no effect here",
    ],
)
def test_a_dump_of_settings_is_no_message(line: str) -> None:
    assert explain(line).kind == "unknown"
    assert explain(f"{line}\nINFO:     Application startup complete.\n").kind == "healthy"
    died = explain(f"{line}\nRuntimeError: CUDA error: invalid device ordinal\n")
    assert (died.kind, died.also) == ("no_such_gpu", ())


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: The repository for x contains custom code which must be executed to correctly"
        " load the model. Please pass the argument `trust_remote_code=True` to allow it.",
        "ValueError: Loading x requires you to execute the configuration file in that repo on your"
        " local machine. Make sure you have read the code there, then set the option"
        " `trust_remote_code=True` to remove this error.",
    ],
)
def test_what_refuses_a_checkpoints_code(line: str) -> None:
    assert explain(line).kind == "remote_code"


def test_what_an_engine_outlived_is_no_cause() -> None:
    warned = CARD.format("NVIDIA X", "sm_61") + "INFO:     Uvicorn running on http://0.0.0.0:1\n"
    assert explain(warned).kind == "healthy"


@pytest.mark.parametrize(
    ("log", "kind", "said"),
    [
        (CARD.format("RTX 5070", "sm_120") + ARCHES.format("sm_70 sm_80 sm_90"), "gpu_too_new",
         "the build ends at sm_90"),
        (CARD.format("GTX 1080", "sm_61") + ARCHES.format("sm_75 sm_80 sm_120"), "gpu_too_old",
         "the build begins at sm_75"),
        ("GPU 0: NVIDIA GeForce RTX 5080\n" + NO_KERNEL, "gpu_too_new", "sm_120"),
        ("GPU 0: Tesla V100-SXM2-32GB\n" + NO_KERNEL, "gpu_too_old", "sm_70"),
        (NO_KERNEL, "no_kernel_image", "no code for this card"),
        ("RuntimeError: [TM][ERROR] CUDA runtime error: no kernel image is available for execution"
         " on the device /l/llama_kernels.cu:80", "no_kernel_image", "no code for this card"),
    ],
)  # fmt: skip
def test_a_build_for_other_cards_is_too_old_or_too_new(log: str, kind: str, said: str) -> None:
    found = explain(log)
    assert found.kind == kind
    assert said in found.what
    if kind == "no_kernel_image":
        assert found.unknown


def test_vllm_without_room_for_any_cache() -> None:
    found = explain(VLLM.format("24.00", "15.50", "-1.20"))
    assert found.missing is not None
    assert found.missing.bytes == round(1.2 * GIB)
    assert any("above 0.75," in one for one in found.changes)  # (15.5 + 0.1 + 2.4) / 24
    more_than_the_card = explain(VLLM.format("24.00", "23.50", "-9.20"))
    assert not any("gpu-memory-utilization above" in one for one in more_than_the_card.changes)
    bare = explain(VLLM.splitlines()[-1])
    assert (bare.kind, bare.missing and bare.missing.bytes) == ("no_kv_memory", None)


@pytest.mark.parametrize("width", [None, 60, 79, 100, 118])
def test_the_length_that_vllm_says_would_do(width: int | None) -> None:
    """Wherever a terminal broke the line, at a space or in a word."""
    step = width or len(LONGEST)
    lines = [LONGEST[at : at + step].rstrip() for at in range(0, len(LONGEST), step)]
    found = explain("\n".join(lines[:7]) + "\n")
    assert found.kind == "no_kv_memory"
    assert found.missing is not None
    assert found.missing.bytes == round(1.25 * GIB)
    assert any("--max-model-len 54608" in one for one in found.changes)


@pytest.mark.parametrize("device", ["", "cuda:1 "])
def test_the_utilization_that_the_free_memory_allows(device: str) -> None:
    found = explain(
        f"ValueError: Free memory on device {device}(17.03/23.56 GiB) on startup is less than"
        " desired GPU memory utilization (0.9, 21.2 GiB). Decrease GPU memory utilization"
    )
    assert found.kind == "card_occupied"
    assert any("--gpu-memory-utilization 0.722 at most" in one for one in found.changes)
    assert found.missing is not None
    assert found.missing.bytes == round((21.2 - 17.03) * GIB)
    assert any("GPU 1" in one for one in found.why) == bool(device)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("Qwen3VLForConditionalGeneration", "pip install -U lmdeploy"), ("NobodysModel", "another")],
)
def test_an_architecture_that_a_newer_lmdeploy_runs(architecture: str, said: str) -> None:
    found = explain(f"RuntimeError: Can not found rewrite for architectures: ['{architecture}']")
    assert found.kind == "unsupported_model"
    assert any(said in one for one in found.changes)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was"
         " attempted on non supported HW", "driver_too_old"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, please"
         " update your driver", "driver_too_old"),
        ("ImportError: /v/vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda", "library_mismatch"),
        ("ImportError: /lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by /x)",
         "old_system"),
        ("ModuleNotFoundError: No module named 'einops'", "missing_package"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
         "no_kv_memory"),
        ("ValueError: This model's maximum context length is 4096 tokens. However, you requested"
         " 5000 tokens (4500 in the messages, 500 in the completion).", "request_rejected"),
        ("2025-01-01 - lmdeploy - ERROR - session 3 exceed session max length", "request_rejected"),
        ("KeyError: 'qwen3_vl_moe'", "old_transformers"),
        ("KeyError: 'weight'", "unknown"),
        ("[TP0] Watchdog timeout (self.watchdog_timeout=300)\nKilled", "hang"),
        ("[TM][WARNING] [RejectInvalidRequests] Skipping invalid infer request for id 3, code = 6",
         "request_rejected"),
    ],
)  # fmt: skip
def test_messages_of_programs_around_the_engine(line: str, kind: str) -> None:
    assert explain(line).kind == kind


#: A message of each row that was learned from public reports, with made-up details.
LEARNED = (
    (
        "tp_impossible",
        "ValueError: Total number of attention heads (28) must be divisible by tensor"
        " parallel size (8).",
    ),
    (
        "tp_impossible",
        "ValueError: Weight input_size_per_partition = 9472 is not divisible by"
        " min_thread_k = 128. Consider reducing tensor_parallel_size",
    ),
    (
        "too_few_gpus",
        "ValueError: World size (4) is larger than the number of available GPUs (2) in this node.",
    ),
    (
        "cuda_fork",
        "RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with"
        " multiprocessing, you must use the 'spawn' start method",
    ),
    (
        "no_main_guard",
        "RuntimeError: An attempt has been made to start a new process before the"
        " current process has finished its bootstrapping phase.",
    ),
    (
        "gpu_too_old",
        "ValueError: The quantization method awq is not supported for the current GPU."
        " Minimum capability: 75. Current capability: 70.",
    ),
    (
        "gpu_too_old",
        "RuntimeError: ('Quantization scheme is not supported for ', 'the current GPU."
        " Min capability: 80. ', 'Current capability: 75.')",
    ),
    ("gpu_too_old", "ValueError: type fp8e4nv not supported in this architecture."),
    (
        "wrong_dtype",
        "ValueError: torch.bfloat16 is not supported for quantization method awq."
        " Supported dtypes: [torch.float16]",
    ),
    ("lora_rank", "ValueError: LoRA rank 48 is greater than max_lora_rank 16."),
    ("unsupported_adapter", "ValueError: base.lm_head.weight is unsupported LoRA weight"),
    (
        "no_chat_template",
        "ValueError: As of transformers v4.44, default chat template is no longer"
        " allowed, so you must provide a chat template",
    ),
    (
        "context_too_long",
        "  Value error, User-specified max_model_len (65536) is greater than the"
        " derived max_model_len (max_position_embeddings=32768 or model_max_length=None)",
    ),
    (
        "context_too_long",
        "ValueError: max_num_batched_tokens (2048) is smaller than max_model_len (8192).",
    ),
    (
        "unsupported_model",
        "ValueError: Model architectures ['NewForCausalLM'] are not supported for now.",
    ),
    (
        "unsupported_model",
        "ValueError: NewVLModel has no vLLM implementation and the Transformers"
        " implementation is not compatible with vLLM.",
    ),
    (
        "old_transformers",
        "Exception: data did not match any variant of untagged enum ModelWrapper"
        " at line 757 column 3",
    ),
    (
        "old_transformers",
        "ValueError: Tokenizer class NewTokenizer does not exist or is not currently imported.",
    ),
    (
        "package_versions",
        "ImportError: huggingface-hub>=0.34.0,<1.0 is required for a normal"
        " functioning of this module, but found huggingface-hub==1.1.0.",
    ),
    ("missing_extension", "ModuleNotFoundError: No module named 'vllm._C'"),
    ("not_on_windows", "ModuleNotFoundError: No module named 'resource'"),
    ("package_versions", "ModuleNotFoundError: No module named 'transformers.onnx'"),
    ("package_versions", "AttributeError: module 'torch' has no attribute 'float8_e8m0fnu'"),
    ("library_mismatch", "RuntimeError: operator torchvision::nms does not exist"),
    (
        "old_torch",
        "ValueError: Due to a serious vulnerability issue in `torch.load`, we now require"
        " users to upgrade torch to at least v2.6",
    ),
    ("library_missing", "ImportError: libcudart.so.12: cannot open shared object file: No such"),
    ("library_missing", "ImportError: libGL.so.1: cannot open shared object file: No such file"),
    (
        "library_mismatch",
        "ImportError: DLL load failed while importing _turbomind: The specified"
        " module could not be found.",
    ),
    (
        "incomplete_checkpoint",
        "OSError: /models/a does not appear to have a file named config.json."
        " Checkout 'https://huggingface.co//models/a/main' for available files.",
    ),
    (
        "incomplete_checkpoint",
        "ValueError: Unrecognized model in /models/a. Should have a"
        " `model_type` key in its config.json",
    ),
    ("weights_mismatch", "ValueError: There is no module or parameter named 'lm_head.scale' in X"),
    ("weights_mismatch", "KeyError: 'model.layers.0.mlp.experts.w2_weight'"),
    (
        "wrong_quantization",
        "ValueError: Quantization method specified in the model config (gptq)"
        " does not match the quantization method specified in the `quantization` argument (awq).",
    ),
    ("index_out_of_range", "RuntimeError: CUDA error: device-side assert triggered"),
    ("nan_logits", "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"),
    (
        "cublas_error",
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"
        " `cublasCreate(handle)`",
    ),
    (
        "container_without_gpu",
        "docker: Error response from daemon: OCI runtime create failed:"
        " nvidia-container-cli: initialization error: load library failed: libnvidia-ml.so.1",
    ),
    ("image_missing", "docker: Error response from daemon: manifest for x/y:z not found"),
    (
        "no_hub",
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co',"
        " port=443): Max retries exceeded with url: /a/b/resolve/main/config.json",
    ),
    (
        "damaged_download",
        "OSError: Consistency check failed: file should be of size 90 but has size"
        " 7 (model.safetensors).",
    ),
    ("engine_gone", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."),
    ("build_failed", "RuntimeError: Failed to find C compiler. Please specify via CC"),
    ("gpu_too_new", "ptxas fatal   : Value 'sm_120a' is not defined for option 'gpu-name'"),
    (
        "driver_too_old",
        "RuntimeError: CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    ),
    ("no_gpu", "RuntimeError: Failed to infer device type"),
    (
        "no_fabric_manager",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802:"
        " system not yet initialized",
    ),
    ("gpu_lost", "RuntimeError: CUDA error: uncorrectable ECC error encountered"),
    ("illegal_access", "RuntimeError: CUDA error: unspecified launch failure"),
    (
        "image_tokens",
        "ValueError: Image features and image tokens do not match: tokens: 0, features 324",
    ),
    ("request_rejected", "ValueError: At most 1 image(s) may be provided in one request."),
    (
        "request_rejected",
        "ValueError: The decoder prompt (length 9000) is longer than the maximum"
        " model length of 8192.",
    ),
    (
        "wrong_model_name",
        "openai.NotFoundError: Error code: 404 - {'message': 'The model `a` does not exist.'}",
    ),
    ("unknown_option", "api_server.py: error: unrecognized arguments: --no-such-option"),
    (
        "rendezvous",
        "torch.distributed.DistNetworkError: The client socket has timed out after"
        " 600000ms while trying to connect to (10.0.0.7, 29500).",
    ),
    ("duplicate_gpu", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
    ("no_peer_access", "Failed: Cuda error /w/csrc/custom_all_reduce.cuh:453 'invalid argument'"),
    ("nccl_error", "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO)"),
    (
        "out_of_memory",
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256"
        " dummy requests. Please try lowering `max_num_seqs`",
    ),
    ("memory_profiling", "AssertionError: Error in memory profiling. Initial free memory 10 GiB"),
    ("offload", "ValueError: Some modules are dispatched on the CPU or the disk. Make sure you"),
    (
        "wrong_dtype",
        "RuntimeError: expected mat1 and mat2 to have the same dtype, but got: float != c10::Half",
    ),
    ("too_many_files", "OSError: [Errno 24] Too many open files"),
    ("no_permission", "PermissionError: [Errno 13] Permission denied: '/data/x'"),
    ("illegal_instruction", "Illegal instruction (core dumped)"),
    (
        "engine_bug",
        "RuntimeError: Decode out of memory. Try to lower your batch size.\nTry to"
        " allocate 90 tokens.\nAvaliable tokens: 4096",
    ),
    (
        "out_of_memory",
        "RuntimeError: Decode out of memory. Try to lower your batch size.\nTry to"
        " allocate 90 tokens.\nAvaliable tokens: 12",
    ),
    (
        "too_many_requests",
        "RuntimeError: alloc_req_slots runs out of memory. Please set a smaller"
        " number for `--max-running-requests`.",
    ),
    (
        "turbomind_missing",
        "2024-07-18 15:50:07,708 - lmdeploy - WARNING - Fallback to pytorch"
        " engine because turbomind engine is not installed correctly.",
    ),
    ("no_hub", "HTTPError: 404 Client Error: Not Found for url: https://huggingface.co/api/x"),
    ("driver_too_old", "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"),
    (
        "wrong_class",
        "ValueError: Unrecognized configuration class <class 'x.LlavaNextConfig'> for"
        " this kind of AutoModel: AutoModel.",
    ),
    ("request_failed", '2025-03-19 - lmdeploy - ERROR - session 85 finished, reason "error"'),
    ("file_missing", "FileNotFoundError: [Errno 2] No such file or directory: '/models/x.json'"),
    ("bad_image", "PIL.UnidentifiedImageError: cannot identify image file <_io.BytesIO>"),
    ("crashed", "Segmentation fault (core dumped)"),
    ("not_installed", "bash: lmdeploy: command not found"),
    ("no_cuda_toolkit", "AssertionError: Can not find $env:CUDA_PATH"),
    (
        "windows_tp",
        "RuntimeError: [TM][ERROR]  Assertion fail: D:\\a\\src/models/llama/Barrier.h:20",
    ),
    ("engine_gone", "RuntimeError: Rank[0] failed."),
    ("package_versions", "ImportError: cannot import name 'x' from 'outlines.models'"),
    ("module_missing", "ModuleNotFoundError: No module named 'models.vision'"),
    (
        "no_hub",
        "An error happened while trying to locate the file on the Hub and we cannot find it",
    ),
    ("nccl_error", "Unhandled exception: what(): NCCL Error 5: invalid usage"),
    ("no_chat_template", '{"error": "Template error: template not found"}'),
    ("no_chat_template", "Cannot provide chat completion for tokenizer: <class 'NoneType'>"),
    (
        "no_permission",
        "error while loading shared libraries: /l/p.so: cannot open shared object file:"
        " Permission denied",
    ),
    ("no_threads", "  what():  Operation not permitted"),
    ("package_versions", "ValueError: You have a version of `bitsandbytes` that is not compatible"),
    ("missing_package", "ModuleNotFoundError: No module named 'triton'"),
    ("ray_waits", "ValueError: Ray does not allocate any GPUs on the driver node. Consider"),
    (
        "package_versions",
        "ValueError: `.to` is not supported for `4-bit` or `8-bit` bitsandbytes"
        " models. Please use the model as it is",
    ),
    ("cuda_error", "cudaErrorUnknown: unknown error"),
    ("hang", "Health check failed. Server couldn't get a response from detokenizer for last 20 s"),
    ("package_versions", "KeyError: 'architectures'"),
    ("package_versions", "AttributeError: module 'torch' has no attribute 'cuda'"),
    ("weights_mismatch", "ValueError: Unexpected weight: model.layers.0.mlp.down_proj.bias"),
    (
        "engine_gone",
        "Exception: Capture cuda graph failed: [gloo/transport/tcp/pair.cc:534] Connection closed"
        " by peer [10.0.0.2]:21290",
    ),
    (
        "request_rejected",
        "openai.BadRequestError: Error code: 400 - {'object': 'error', 'message': \"[{'type': 'x',"
        " 'msg': 'Extra inputs are not permitted', 'input': 64}]\", 'code': 400}",
    ),
    (
        "package_versions",
        "ImportError: cannot import name 'LLM' from partially initialized module"
        " 'vllm' (most likely due to a circular import) (/w/vllm.py)",
    ),
    ("old_python", "ImportError: cannot import name 'Mapping' from 'collections' (/usr/lib)"),
    ("killed", "Normal  Killing  kubelet  Container a failed liveness probe, will be restarted"),
    ("bad_image", "ClientResponseError: 403, message='Forbidden', url='https://example.org/a.jpg'"),
    ("bad_json", "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ("no_server", "httpx.ConnectError: All connection attempts failed"),
    ("no_server", "openai.APITimeoutError: Request timed out."),
    ("gpu_too_new", "nvrtc: error: invalid value for --gpu-architecture (-arch)"),
    (
        "gpu_too_new",
        "RuntimeError: Ninja build failed.\nnvcc fatal   : Unsupported gpu architecture 'sm_120a'",
    ),
    ("calibration_data", "RuntimeError: Dataset scripts are no longer supported, but found x.py"),
    ("package_versions", "AttributeError: 'Catcher' object has no attribute 'attention_type'"),
    ("package_versions", "ValueError: 'aimv2' is already used by a Transformers config"),
    ("missing_extension", "AttributeError: '_OpNamespace' '_C' object has no attribute 'x'"),
    (
        "missing_package",
        "ImportError: Using `bitsandbytes` 4-bit quantization requires the latest version of it",
    ),
    ("shared_memory", "RuntimeError: unable to write to file </torch_1_2>: No space left (28)"),
    ("event_loop", "RuntimeError: Current event loop is different from the one bound to loop task"),
    ("shape_mismatch", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x3 and 4x2)"),
    ("wrong_class", "KeyError: 'Qwen2RMConfig'"),
    ("kernel_compile", "RuntimeError: PassManager::run failed"),
    ("on_cpu", "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'"),
    ("offload", "NotImplementedError: Cannot copy out of meta tensor; no data!"),
    ("cudnn_error", "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    ("damaged_download", "Connection broken: IncompleteRead(1 bytes read, 2 more expected)"),
    ("damaged_download", "Error while deserializing header: HeaderTooLarge"),
    ("request_rejected", "jinja2.exceptions.TemplateError: Conversation roles must alternate"),
    ("request_rejected", "TypeError: TextEncodeInput must be Union[TextInputSequence]"),
    ("request_rejected", '"POST /v1/chat/completions HTTP/1.1" 400 Bad Request'),
    ("missing_package", "ValueError: Couldn't instantiate the backend tokenizer from one of:"),
    ("missing_package", "importlib.metadata.PackageNotFoundError: No package metadata was found"),
    ("package_versions", "TypeError: gemm_forward_cuda(): incompatible function arguments."),
    ("proxy", "AssertionError: res=<Response [502]>, res.text=''"),
    (
        "nccl_timeout",
        "what():  [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1,"
        " OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600090 ms",
    ),
    ("unknown", "AssertionError"),
    # What sets 8 and 9 of bench/faults/FRESH_REPORTS.md taught.
    ("package_versions", "AttributeError: 'AForCausalLM' object has no attribute 'generate'"),
    (
        "processor_mismatch",
        "AttributeError: 'ATokenizer' object has no attribute 'image_processor'",
    ),
    ("package_versions", "AttributeError: 'InternVLModel' object has no attribute 'chat'"),
    ("unknown", "AttributeError: 'AModel' object has no attribute 'language_model'"),
    ("processor_mismatch", "ValueError: Incorrect image source. Must be a URL. Got USER: <image>"),
    ("bad_image", "ValueError: Incorrect image source. Must be a URL. Got /a/b.png"),
    (
        "package_versions",
        "TypeError: AProcessor: got multiple values for keyword argument 'images'",
    ),
    (
        "weights_mismatch",
        "size mismatch for a.weight: copying a param with shape torch.Size([4096, 1024]) from"
        " checkpoint, the shape in current model is torch.Size([2097152, 1]).",
    ),
    ("engine_gone", "  what():  tensor does not have a device"),
)


def test_what_a_server_refuses_goes_before_that_it_is_up() -> None:
    up = "INFO:     Application startup complete.\n"
    refused = "ERROR message='The model `/m/x` does not exist.' type='NotFoundError' code=404\n"
    assert explain(up + refused).kind == "wrong_model_name"


@pytest.mark.parametrize(("kind", "line"), LEARNED, ids=lambda text: text[:40])
def test_kinds_that_people_report(kind: str, line: str) -> None:
    assert explain(f"INFO: starting\n{line}\n").kind == kind


@pytest.mark.parametrize(
    ("kind", "path"), [("wrong_setting", "vllm/config/model.py"), ("unknown", "kernels/layer.py")]
)
def test_a_sentence_is_the_program_s_refusal_only_where_its_code_says_it(
    kind: str, path: str
) -> None:
    log = (
        "Traceback (most recent call last):\n"
        '  File "/venv/site-packages/transformers/integrations/hub_kernels.py", line 8, in load\n'
        f'  File "/venv/site-packages/{path}", line 9, in __init__\n'
        "ValueError: Either a revision or a version must be specified.\n"
    )
    assert explain(log).kind == kind


def test_the_advice_for_a_shortage_names_what_decides_where_the_phase_is_not_known() -> None:
    found = explain(
        "$ vllm serve /models/a --gpu-memory-utilization 0.8\n"
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a"
        " total capacity of 10.73 GiB of which 46.44 MiB is free.\n"
    )
    assert "if it was still loading its weights" in " ".join(found.changes)


def test_a_divisor_of_the_heads_is_named() -> None:
    found = explain(LEARNED[0][1])
    assert any("e.g. 7" in one for one in found.changes)


def test_words_before_another_exception_are_no_event() -> None:
    words = "the model `x` does not exist here, and the default chat template is no longer allowed"
    unknown = "Traceback (most recent call last):\nZeroDivisionError: division by zero\n"
    assert explain(f"{words}\n{unknown}").kind == "unknown"
    assert explain(f"{words}\n").kind == "no_chat_template"


def test_an_error_that_nobody_knows_goes_before_what_its_parent_says() -> None:
    parent = "RuntimeError: Engine core initialization failed. See root cause above."
    found = explain(f"ZeroDivisionError: division by zero\n{parent}\n")
    assert found.kind == "unknown"
    assert "ZeroDivisionError" in found.what
    assert explain(parent).kind == "engine_gone"


REFUSED = "ValueError: this quantization is not supported"


@pytest.mark.parametrize("before", [False, True])
def test_a_cause_goes_before_what_a_check_says_by_its_form(before: bool) -> None:
    cause = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    lines = (REFUSED, cause) if before else (cause, REFUSED)
    assert explain(REFUSED).kind == "unsupported_feature"
    assert explain("\n".join(lines)).kind == "out_of_memory"


def test_an_unknown_error_after_a_check_goes_before_it() -> None:
    found = explain(f"{REFUSED}\nZeroDivisionError: division by zero\n")
    assert found.kind == "unknown"
    assert found.also == (f"line 1: {explain(REFUSED).what}",)


DRIVER = (
    "/venv/torch/cuda/__init__.py:129: UserWarning: CUDA initialization: The NVIDIA driver on your"
    " system is too old (found version 11040).\n"
)


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("unknown", f"{DRIVER}ValueError: another thing\n"),
        ("driver_too_old", f"{DRIVER}RuntimeError: Failed to infer device type\n"),
        (
            "unknown",
            "WARNING 06-01 22:03:06 [a.py:2] ModuleNotFoundError: No module named 'x'\n"
            "ValueError: another thing\n",
        ),
        (
            "unknown",
            "2025-03-19 - lmdeploy - WARNING - Fallback to pytorch engine because `/m` not"
            " supported by turbomind engine.\nRuntimeError: another thing\n",
        ),
        (
            "request_rejected",
            "ERROR Error in preprocessing prompt inputs\n"
            "ValueError: At most 1 image(s) may be provided in one request.\n",
        ),
        ("interrupted", "KeyboardInterrupt\nAborted (core dumped)\n"),
        (
            "healthy",
            "INFO:     Uvicorn running on http://0.0.0.0:8000\nINFO 06-01 22:03:06 [logger.py:39]"
            " Received request c-1: prompt: 'MemoryError', params: SamplingParams(n=1)\n",
        ),
    ],
)
def test_what_a_run_outlived_or_a_client_wrote_is_no_cause(kind: str, log: str) -> None:
    assert explain(log).kind == kind


def test_rows_use_figures_and_groups_that_exist() -> None:
    facts = {name for text in fact_patterns() for name in re.compile(text).groupindex}
    for cause in causes():
        groups = re.compile(cause.pattern).groupindex
        for text in (cause.what, *cause.why, *cause.change):
            named = {name for name in re.findall(r"\{(\w+)\}", text) if not name.isdigit()}
            assert named <= {*groups, *FIGURES, *facts}, cause.what
        assert set(cause.when) <= {*FIGURES, *facts, "communicator"}, cause.what
        assert cause.source or cause.kind, cause.what
    assert len(FIGURES) <= 20
