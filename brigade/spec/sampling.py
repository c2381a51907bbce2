"""What a caller may ask of one generation. Plain numbers: the API fills it in, scheduler and sampler read it."""

from dataclasses import dataclass, replace

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next tokens and when to stop.

    Defaults are OpenAI's where OpenAI has the field, and "no effect" elsewhere. `temperature` 0 is greedy.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int | None = None
    """Equal seeds give equal text for equal prompts, whatever else runs; None draws a fresh one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None: no log-probabilities; k: those of the chosen token and of the k most likely ones."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1

    def choices(self) -> list["SamplingParams"]:
        """One set for each of the `n` answers: a given seed counts up, so that the answers differ but repeat."""
        seeds = [None if self.seed is None else _wrapped(self.seed + i) for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]

    def check(self, vocab: int) -> None:
        """Raise ValueError, naming the field, unless every value can be served by a model of `vocab` tokens."""
        _count("max_tokens", self.max_tokens, 1, 1 << 31)
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be greater than 0")
        _count("top_k", self.top_k, 0, 1 << 31)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _count("n", self.n, 1, MAX_N)
        if self.seed is not None:
            _count("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if self.logprobs is not None:
            _count("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        for name in ("logit_bias", "stop_token_ids", "stop"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} must be a tuple")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.logit_bias):
            raise ValueError("logit_bias must hold pairs of a token id and a number")
        if len(self.logit_bias) > 1024:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries; at most 1024 are allowed")
        for token, bias in self.logit_bias:
            _count("logit_bias token id", token, 0, vocab - 1)
            _within("logit_bias value", bias, -100.0, 100.0)
        if len(self.stop_token_ids) > 128:
            raise ValueError(f"stop_token_ids has {len(self.stop_token_ids)} entries; at most 128 are allowed")
        for token in self.stop_token_ids:
            _count("stop_token_ids entry", token, 0, vocab - 1)
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS or not _is_unicode(text):
                raise ValueError(f"stop strings must be valid Unicode text of 1 to {MAX_STOP_CHARS} characters")


def _is_unicode(text: str) -> bool:
    """False with a lone surrogate, which cannot be encoded."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _wrapped(seed: int) -> int:
    """Back into 64 bits with a sign."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _count(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    _within(name, value, low, high)


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if low <= value <= high:  # false for NaN too
        return
    shown = value if -1e18 < value < 1e18 else "that"  # a number of a million digits is not worth repeating
    raise ValueError(f"{name} must be a finite number between {low} and {high}, not {shown}")
