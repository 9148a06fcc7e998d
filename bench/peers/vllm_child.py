"""vLLM's own part, run by vLLM's Python on a pretend machine: MODEL OPTIONS CASES (both JSON).

OPTIONS are vLLM's own, beside the defaults of ``vllm serve``. Each case is queued whole. Says
``PEERS`` on stderr as it goes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any


def mend_partial_prefill() -> None:
    """A prompt that is not read to its end samples nothing, one that is samples one token.

    vLLM lets Triton kernels write these numbers; on a pretend machine no kernel computes, and the
    scheduler would stop at its own assertion or wait for ever. Memory is not touched by it.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    update = Scheduler.update_from_output

    def update_from_output(self: Any, scheduled: Any, output: Any) -> Any:
        cached = scheduled.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
        for name, index in output.req_id_to_index.items():
            request = self.requests.get(name)
            done = before.get(name, 0) + scheduled.num_scheduled_tokens.get(name, 0)
            if request is None or not output.sampled_token_ids:
                continue
            if done < request.num_prompt_tokens:
                output.sampled_token_ids[index] = []
            elif not output.sampled_token_ids[index]:
                output.sampled_token_ids[index] = [0]
        return update(self, scheduled, output)

    Scheduler.update_from_output = update_from_output


def serve_defaults() -> None:
    """The offline class sizes its batches as ``vllm serve`` does: 2,048 tokens, not 8,192."""
    from vllm.entrypoints import llm
    from vllm.usage.usage_lib import UsageContext

    llm.UsageContext = SimpleNamespace(LLM_CLASS=UsageContext.OPENAI_API_SERVER)


def know_internvl(model: str) -> None:
    """InternVL's chat models bring a config class of their own, which a stand-in does not."""
    with open(f"{model}/config.json", encoding="utf-8") as file:
        if json.load(file)["model_type"] != "internvl_chat":
            return
    from turbofit.rehearse.turbomind.hfconfig import register_internvl

    register_internvl(whole=True)


def need_kernels() -> None:
    """A pretend card runs without kernels, a real one does not.

    A fork asks, since vLLM forks its engine, which a process with a CUDA context of its own cannot.

    Raises:
        ValueError: torch was built for later cards only.
    """
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)
        return
    code = 1
    try:
        _compare_card()
        code = 0
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _compare_card() -> None:
    import torch
    from vllm.platforms import current_platform

    card = current_platform.get_device_capability()
    built = [int(word[3:]) for word in torch._C._cuda_getArchFlags().split() if word[:3] == "sm_"]
    if card is not None and built and card.to_int() < min(built):
        told = f"compute capability {card.as_version_str()} is not supported: "
        raise ValueError(f"{told}torch {torch.__version__} has code from sm_{min(built)} on")


def prompts_of(case: dict[str, Any], longest: int) -> list[dict[str, Any]]:
    """A case as vLLM's prompts; every picture differs, so that no cache answers for it."""
    if "size" not in case:
        tokens = min(case["tokens"], longest)
        return [{"prompt_token_ids": [10] * tokens}] * case["count"]
    from PIL import Image

    return [
        {
            "prompt": case["prompt"] + "a" * (2 + 61 * i % 257),
            "multi_modal_data": {"image": Image.new("RGB", tuple(case["size"]), (i, 9, 9))},
        }
        for i in range(case["count"])
    ]


def say(what: str) -> None:
    print(f"PEERS {what}", file=sys.stderr, flush=True)


def main() -> None:
    model, options, cases = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    begun = time.monotonic()
    import vllm

    mend_partial_prefill()
    serve_defaults()
    know_internvl(model)
    need_kernels()
    llm = vllm.LLM(model=model, **options)
    say(f"ready {time.monotonic() - begun:.1f}")
    length, new = llm.model_config.max_model_len, 2
    say(f"session {length}")
    for case in cases:
        say(f"case {case['name']}")
        hot = 1.0 if case.get("sampled") else 0.0
        parameters = vllm.SamplingParams(max_tokens=new, ignore_eos=True, temperature=hot, top_k=0)
        try:
            out = llm.generate(prompts_of(case, length - new), parameters, use_tqdm=False)
        except ValueError as error:  # turned away; the engine lives on
            say(f"away {case['name']}: {' '.join(str(error).split())[:160]}")
            continue
        say(f"answered {len(out)}, prompts of {len(out[0].prompt_token_ids or ())} tokens")
    say("survived")


if __name__ == "__main__":
    main()
