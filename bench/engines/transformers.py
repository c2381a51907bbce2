"""transformers as an engine to measure: generate() on a batch, its grouped matrix product for the experts."""

import time
from typing import Any

from bench.engines.wire import WARM_TOKENS, Decoded, Options, Prompts, answer, decoded

PRECISIONS = ("bf16",)


class Stamps:
    """A streamer, as generate() wants one, that only notes when each step's tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None: ...


class LoadedTransformers:
    """The model in this process."""

    def __init__(self, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        settings = {"experts_implementation": "grouped_mm"} | options.settings
        self._model: Any = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16, **settings)
        self._model.eval()  # type: ignore[no-untyped-call]
        self._settings = settings

    def facts(self) -> dict[str, Any]:
        import transformers

        return {"version": transformers.__version__, "notes": [f"{k}={v}" for k, v in self._settings.items()]}

    def warm(self, prompts: Prompts) -> None:
        self._times(prompts, WARM_TOKENS)

    def decode(self, prompts: Prompts, n_out: int) -> Decoded:
        start = time.monotonic()
        times = self._times(prompts, n_out)
        return decoded(start, [times] * len(prompts))

    def prefill(self, prompts: Prompts) -> list[float]:
        seconds = []
        for prompt in prompts:
            start = time.monotonic()
            seconds.append(self._times([prompt], 1)[0] - start)
        return seconds

    def _times(self, prompts: Prompts, n_out: int) -> list[float]:
        """When each of the `n_out` steps ended; all requests step together."""
        import torch

        ids, stamps = torch.tensor(prompts), Stamps()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_out,
                min_new_tokens=n_out,
                do_sample=False,
                pad_token_id=0,
                streamer=stamps,
            )
        return stamps.times[1:]  # the first call gives the prompt back


def environment(options: Options) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}


def python(options: Options) -> str:
    return f"{options.venv}/bin/python"


if __name__ == "__main__":
    answer(LoadedTransformers)
