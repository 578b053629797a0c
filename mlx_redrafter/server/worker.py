"""The engine thread: it loads the model, answers one request after the other, and frees.

MLX's streams belong to a thread, so everything that computes happens here; handlers of HTTP
exchange plain values with it. A scheduler of several answers at once would stand where
`Worker._run` stands, a cache of sessions where `Worker._session` does.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import threads
from mlx_redrafter.server import problems
from mlx_redrafter.server.engine import Engine
from mlx_redrafter.server.events import Drawn, Event, Failed, Finished, Progress, Reason, Usage
from mlx_redrafter.server.reader import Reader
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.text.answer import GenerationResponse

Deliver = Callable[[int, Event], None]
Load = Callable[[], Engine]


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Job:
    """The answers to one request.

    Args:
        id: of the request, for the log.
        generations: the answers to make, in this order.
        deliver: called in the engine thread with the number of an answer and what happened to it;
            the last event of each is `Finished`, or `Failed`, which ends the job.
    """

    id: str
    generations: Sequence[Generation]
    deliver: Deliver
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _why: problems.Problem | None = None

    def cancel(self, why: problems.Problem | None = None) -> None:
        """Stop after the running step; ``why`` is told to whoever still listens."""
        self._why = self._why or why
        self._cancelled.set()

    def check(self) -> None:
        """Raises Cancelled."""
        if self._cancelled.is_set():
            raise self._why or Cancelled


class Worker:
    """The thread, and the queue before it.

    Args:
        load: makes the engine, in the thread.
        queue: the most requests that wait.
        say: takes a line of the log.
        on_ready: called in the thread when the model is loaded, or could not be.
    """

    def __init__(
        self,
        load: Load,
        queue: int = 64,
        say: Callable[[str], None] = lambda line: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue, self.say = queue, say
        self.engine: Engine | None = None
        self.failure: BaseException | None = None  # why there is no engine
        self._load, self._on_ready = load, on_ready
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model, and take requests from then on."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Does the engine thread live?"""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Is a request answered now, or put into the queue?"""
        return self.engine is not None and self.alive and not self._draining

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        with self._changed:
            return int(self._running is not None), len(self._jobs)

    def available(self) -> Engine:
        """The engine; raises Problem where nothing is answered now."""
        if self._draining:
            raise problems.unavailable("the server is shutting down")
        if self.engine is None:
            raise problems.unavailable("the model is still loading")
        if not self.alive:
            raise problems.unavailable("the engine thread has ended")
        return self.engine

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises Problem: full, or not available."""
        with self._changed:
            self.available()
            if len(self._jobs) + (self._running is not None) > self.queue:
                raise problems.queue_full(len(self._jobs))
            self._jobs.append(job)
            self._changed.notify_all()

    def withdraw(self, job: Job) -> None:
        """Nobody waits for it: out of the queue, or stopped after the running step."""
        job.cancel()
        with self._changed, contextlib.suppress(ValueError):
            self._jobs.remove(job)

    def drain(self) -> None:
        """Take no more requests."""
        self._draining = True

    def stop(self) -> None:
        """End every answer after its running step, and the thread."""
        with self._changed:
            self._draining = self._stopped = True
            why = problems.unavailable("the server is shutting down")
            for job in [*self._jobs, *([self._running] if self._running else [])]:
                job.cancel(why)
            self._changed.notify_all()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end; did it?"""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        threads.clear_at_end()
        try:
            engine = self._load()
            _warm_up(engine)
            self.engine = engine
        except BaseException as error:
            self.failure = error
        finally:
            self._on_ready()
        while self.engine is not None and (job := self._next()) is not None:
            self._run(job, self.engine)

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            self._running = self._jobs.popleft() if self._jobs else None
            return self._running

    def _run(self, job: Job, engine: Engine) -> None:
        """Answer a request. Nothing that goes wrong in one ends the thread."""
        row = 0
        try:
            for row, generation in enumerate(job.generations):
                job.check()
                _answer(engine, generation, self._session(), partial(job.deliver, row), job)
        except Cancelled:
            return
        except problems.Problem as problem:
            self._fail(job, row, problem)
        except OptionError as error:
            self._fail(job, row, problems.of_option(error))
        except Exception as error:
            self.say(f"{job.id}: {place_of(error)}")
            self._fail(job, row, problems.internal(job.id))

    def _session(self) -> Session:
        """What a request begins with."""
        return Session()

    def _fail(self, job: Job, row: int, problem: problems.Problem) -> None:
        with contextlib.suppress(Exception):  # whoever asked may be gone
            job.deliver(row, Failed(problem.wrong))


def _warm_up(engine: Engine) -> None:
    """The first answer compiles the steps: nobody shall wait for that."""
    prompt = list(engine.tokenizer.encode("Hi"))
    asked = Generation(prompt, SamplingParams(), max_tokens=8)
    for _ in engine.answer(asked, Session(), lambda done, total: None):
        pass


def _answer(
    engine: Engine, asked: Generation, session: Session, tell: Callable[[Event], None], job: Job
) -> None:
    """Make one answer, an event or more per step."""

    def progress(done: int, total: int) -> None:
        job.check()
        tell(Progress(done, total))

    reader, thoughts, start = Reader(asked.reading), 0, time.perf_counter()
    drawn: list[tuple[str, bool]] = []
    last: GenerationResponse | None = None
    with contextlib.closing(engine.answer(asked, session, progress)) as responses:
        for last in responses:
            thoughts += reader.thinking
            reader.add(last.text)
            drawn.append((last.text, last.from_draft))
            ended = last.finish_reason is not None
            if last.from_draft and not ended:
                continue  # the step is not over
            job.check()
            if asked.tokens:
                tell(Drawn(tuple(drawn)))
            drawn.clear()
            if ended:
                reader.end()
            for event in reader.taken():
                tell(event)
            if reader.done:
                break
    assert last is not None, "an answer has at least one token"
    reason: Reason = "length" if last.finish_reason == "length" else "stop"
    usage = Usage(
        prompt=last.prompt_tokens,
        completion=last.generation_tokens,
        cached=max(0, len(asked.prompt) - last.stats.prefill_tokens),
        reasoning=thoughts,
        seed=asked.sampling.seed,
        seconds=time.perf_counter() - start,
        stats=last.stats,
    )
    tell(Finished("tool_calls" if reader.called else reason, usage, last.stop))


def place_of(error: BaseException) -> str:
    """What went wrong and where, without the error's text: that may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{at}"
