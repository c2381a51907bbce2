"""Brigade serves sparse mixture-of-experts language models. Offline: `Brigade(model).generate(prompts, params)`."""

from brigade.engine.offline import Brigade
from brigade.spec.sampling import SamplingParams

__all__ = ["Brigade", "SamplingParams"]
