"""The engine as its callers see it: owns the worker process, watches it, replaces it, and hands tokens to generations.

Life of the worker process:
1. spawned with one end of a socket pair, told what to load; Loading... then Ready, or Failed.
2. up: requests go out, steps come back, a ping every PING_EVERY seconds.
3. lost: the socket closed (it died) or no step and no answer came for too long (it is stuck: it is killed). Every
   generation in flight ends with Unavailable, and a new worker is spawned: at once, then after ever longer pauses.
4. closed: the socket is closed, the process ends by itself or, after a deadline, is killed.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from brigade.comm.channel import AsyncChannel, ChannelBroken, ChannelClosed
from brigade.engine.config import EngineConfig
from brigade.engine.generation import Generation
from brigade.engine.messages import (
    Abort,
    Add,
    Failed,
    FromWorker,
    Loading,
    Ping,
    Pong,
    Ready,
    Refused,
    Start,
    Stats,
    Step,
)
from brigade.engine.output import BadRequest, Health, LoadError, Observer, QueueFull, Timings, Unavailable
from brigade.engine.tokenizer import Tokenizer
from brigade.spec.config import BadConfig, read_json, read_spec
from brigade.spec.sampling import SamplingParams

log = logging.getLogger("brigade.engine")

PING_EVERY = 0.5
PING_DEADLINE = 5.0
"""An idle worker that has not answered for this many seconds is not ready."""
READY_STEP_DEADLINE = 10.0
"""A busy worker that has not finished a step for this many seconds is not ready (step_deadline later it is killed)."""
RESTART_WAIT = 30.0
"""How long a new request waits for a worker that is being restarted."""
CLOSE_DEADLINE = 5.0
LONGEST_PAUSE = 30.0
"""Restarts of a worker that dies without having served are this many seconds apart at most."""

_IDLE = Stats(0, 0, 0, 0, 0)


class Unobserved:
    """An Observer that does not listen."""

    def first_token(self, seconds: float, n_prompt: int, n_cached: int) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, timings: Timings, reason: str) -> None: ...
    def restarted(self) -> None: ...


class Engine:
    """One model, served by one worker process. Make it with `start`; use it from one event loop."""

    def __init__(self, config: EngineConfig, observer: Observer | None = None) -> None:
        """Reads the small files of the checkpoint. Raises LoadError."""
        folder = Path(config.model)
        try:
            self.spec = read_spec(folder)
            self.tokenizer = Tokenizer(folder)
            generation = folder / "generation_config.json"
            self.generation: dict[str, Any] = read_json(generation) if generation.exists() else {}
        except BadConfig as e:
            raise LoadError(str(e)) from e
        if self.tokenizer.vocab > self.spec.vocab:
            raise LoadError(
                f"{folder / 'tokenizer.json'}: has {self.tokenizer.vocab} tokens, but config.json's vocab_size is "
                f"{self.spec.vocab}; the two do not belong together"
            )
        self.config = config
        self.ready: Ready
        self._observer = observer or Unobserved()
        self._generations: dict[int, Generation] = {}
        self._rids = itertools.count()
        self._stats = _IDLE
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: AsyncChannel[FromWorker] | None = None
        self._up = asyncio.Event()
        self._heard = self._stepped = 0.0
        self._served_since_start = False
        self._draining = self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure = "the model is being loaded"

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        progress: Callable[[Loading], None] | None = None,
        observer: Observer | None = None,
    ) -> "Engine":
        """Load a model and return when it can answer. Raises LoadError."""
        engine = cls(config, observer)
        try:
            await engine._spawn(progress or (lambda _: None))
        except BaseException:
            await engine.close()
            raise
        engine._tasks = [asyncio.create_task(engine._keep_alive()), asyncio.create_task(engine._watch())]
        return engine

    async def submit(self, prompt: list[int], params: SamplingParams, salt: str = "") -> Generation:
        """Start one generation (`params.n` is the caller's business).

        Raises BadRequest for values that cannot be served, QueueFull when too many requests wait, Unavailable when the
        worker is gone for longer than RESTART_WAIT or the engine is shutting down.
        """
        self._check(prompt, params)
        self._refuse_if_ending()
        if len(self._generations) >= self.config.max_running + self.config.max_waiting:
            raise QueueFull(
                f"{len(self._generations)} requests are running or waiting, which is the limit; try again", 1.0
            )
        if params.seed is None:
            params = replace(params, seed=random.SystemRandom().getrandbits(62))
        generation = Generation(next(self._rids), len(prompt), params, self.tokenizer, self._observer, self._on_end)
        self._generations[generation.rid] = generation
        self._empty.clear()
        try:
            channel = await self._reach_worker()
        except BaseException:
            generation.cancel()
            raise
        if not self._stats.running and not self._stats.waiting:
            self._stepped = time.monotonic()  # an idle worker makes no steps: count from now
        channel.send(Add(generation.rid, prompt, params, salt))
        return generation

    def health(self) -> Health:
        """Ready while steps make progress, or while an idle worker answers its pings."""
        if self._draining:
            return Health(False, "shutting down")
        if not self._up.is_set():
            return Health(False, self._failure)
        now = time.monotonic()
        if self._generations and now - self._stepped > min(READY_STEP_DEADLINE, self.config.step_deadline):
            return Health(False, f"no step was finished for {now - self._stepped:.0f} s")
        if not self._generations and now - self._heard > PING_DEADLINE:
            return Health(False, f"the idle worker has not answered for {now - self._heard:.0f} s")
        return Health(True, "ok")

    def stats(self) -> Stats:
        """The rank's state after its last step or ping."""
        return self._stats

    def drain(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self._draining = True

    async def idle(self, deadline: float) -> bool:
        """Wait until nothing is in flight, at most `deadline` seconds; whether it is so."""
        try:
            await asyncio.wait_for(self._empty.wait(), deadline)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the worker process. Generations in flight end with Unavailable."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop_all("the engine was closed")
        await self._bury()

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        try:
            params.check(self.spec.vocab)
        except ValueError as e:
            raise BadRequest(str(e), param=str(e).split()[0]) from e
        if not prompt:
            raise BadRequest("the prompt is empty; give at least one token", param="prompt")
        if not all(0 <= t < self.spec.vocab for t in prompt):
            raise BadRequest(f"prompt tokens must be between 0 and {self.spec.vocab - 1}", param="prompt")
        room = self.ready.max_context - len(prompt)
        if room < 1 or params.max_tokens > room:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, but the context holds "
                f"{self.ready.max_context} tokens; shorten the prompt or ask for fewer tokens",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )

    def _refuse_if_ending(self) -> None:
        if self._closed:
            raise Unavailable("the engine was closed")
        if self._draining:
            raise Unavailable("shutting down")

    async def _reach_worker(self) -> "AsyncChannel[FromWorker]":
        try:
            await asyncio.wait_for(self._up.wait(), RESTART_WAIT)
        except TimeoutError:
            raise Unavailable(f"no worker: {self._failure}") from None
        self._refuse_if_ending()
        if self._channel is None:
            raise Unavailable(f"no worker: {self._failure}")
        return self._channel

    def _on_end(self, generation: Generation, tell_worker: bool) -> None:
        self._generations.pop(generation.rid, None)
        if not self._generations:
            self._empty.set()
        if tell_worker and self._channel is not None:
            self._channel.send(Abort(generation.rid))

    # The worker process

    async def _spawn(self, progress: Callable[[Loading], None]) -> None:
        """Start a worker and wait until it is ready. Raises LoadError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brigade.engine.loop", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches us alone; the worker ends when we close
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                    # OpenMP's default is to spin while waiting: two threads then take turns on a core that anything
                    # else also wants, and decoding was measured 30 times slower.
                    "OMP_WAIT_POLICY": "PASSIVE",
                },
            )
        channel: AsyncChannel[FromWorker] = await AsyncChannel.over(ours, FromWorker)
        self._channel = channel
        channel.send(Start(self.config))
        try:
            self.ready = await self._await_ready(channel, progress)
        except (ChannelClosed, ChannelBroken) as e:
            raise LoadError(f"the worker process ended while loading ({await self._cause_of_death()})") from e
        self._heard = self._stepped = time.monotonic()
        self._stats = _IDLE
        self._served_since_start = False
        self._up.set()

    async def _await_ready(self, channel: "AsyncChannel[FromWorker]", progress: Callable[[Loading], None]) -> Ready:
        while True:
            for message in await channel.receive():
                match message:
                    case Loading():
                        progress(message)
                    case Ready():
                        return message
                    case Failed(text):
                        raise LoadError(text)
                    case _:
                        raise ChannelBroken(f"{type(message).__name__} before Ready")

    async def _keep_alive(self) -> None:
        """Serve with one worker after another."""
        n_failed = 0
        while True:
            if self._up.is_set():
                await self._serve_worker()
                n_failed = 0 if self._served_since_start else n_failed + 1
            await asyncio.sleep(min(0.5 * (2**n_failed - 1), LONGEST_PAUSE))
            self._observer.restarted()
            try:
                await self._spawn(lambda _: None)
                log.warning("the worker was restarted")
            except LoadError as e:
                n_failed += 1
                self._failure = f"the worker cannot be restarted: {e}"
                log.error(self._failure)
                await self._bury()

    async def _serve_worker(self) -> None:
        """Hand messages out until the worker is lost."""
        channel = self._channel
        assert channel is not None
        try:
            while True:
                for message in await channel.receive():
                    self._take(message)
        except (ChannelClosed, ChannelBroken) as e:
            self._up.clear()
            self._failure = f"the worker process was lost ({e}); it is being restarted"
            # Clients first: finding out why can take a moment.
            self._drop_all("the worker process was lost while it ran this request; it is being restarted, try again")
        log.error("the worker process was lost: %s", await self._cause_of_death())
        await self._bury()

    def _take(self, message: FromWorker) -> None:
        self._heard = time.monotonic()
        match message:
            case Step(tokens, stats):
                self._stepped = self._heard
                self._served_since_start = True
                self._stats = stats
                for token in tokens:
                    if generation := self._generations.get(token.rid):
                        generation.push(token)
            case Pong(_, stats):
                self._stats = stats
            case Refused(rid, text):
                if generation := self._generations.get(rid):
                    generation.fail(BadRequest(text))
            case _:
                raise ChannelBroken(f"unexpected {type(message).__name__}")

    async def _watch(self) -> None:
        """Ping the worker; kill it when it is stuck, so that nothing waits for it for ever."""
        for seq in itertools.count():
            await asyncio.sleep(PING_EVERY)
            if not self._up.is_set() or self._channel is None or self._process is None:
                continue
            self._channel.send(Ping(seq))
            silent = time.monotonic() - self._heard
            if silent > self.config.step_deadline:
                log.error("the worker has been silent for %.0f s; killing it", silent)
                self._process.kill()

    def _drop_all(self, why: str) -> None:
        for generation in list(self._generations.values()):
            generation.fail(Unavailable(why))

    async def _cause_of_death(self) -> str:
        if self._process is None:
            return "it was not started"
        code = await _exit_code(self._process, CLOSE_DEADLINE)
        if code is None:
            return "it closed its channel but still runs"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    async def _bury(self) -> None:
        """Close the channel and wait for the process to end; kill it if it does not."""
        self._up.clear()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        process, self._process = self._process, None
        if process is not None and await _exit_code(process, CLOSE_DEADLINE) is None:
            process.kill()
            await _exit_code(process, CLOSE_DEADLINE)


async def _exit_code(process: "subprocess.Popen[bytes]", deadline: float) -> int | None:
    """Exit code of a process, waiting up to `deadline` seconds for it; None if it still runs."""
    end = time.monotonic() + deadline
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.sleep(0.01)
    return process.poll()
