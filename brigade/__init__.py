"""Brigade serves sparse mixture-of-experts language models. Offline: `Brigade(model).generate(prompts, params)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brigade.engine.offline import Brigade
    from brigade.spec.sampling import SamplingParams

__all__ = ["Brigade", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import the engine only when it is asked for: `import brigade.core` stays free of it, and `--help` quick."""
    if name == "Brigade":
        from brigade.engine.offline import Brigade

        return Brigade
    if name == "SamplingParams":
        from brigade.spec.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'brigade' has no attribute '{name}'")
