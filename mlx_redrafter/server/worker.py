"""The engine thread: it loads the model, runs the answers of all requests, and frees.

MLX's streams belong to a thread, so everything that computes happens here; handlers of HTTP
exchange plain values with it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_redrafter.cache.prefixes import Prefixes
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import threads
from mlx_redrafter.server import problems, together
from mlx_redrafter.server.engine import Engine
from mlx_redrafter.server.events import Event, Failed
from mlx_redrafter.server.metrics import Metrics
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.tally import Tally
from mlx_redrafter.server.writing import Writing

Deliver = Callable[[int, Event], None]
Load = Callable[[], Engine]
ABORT, ERROR = "abort", "error"  # of an answer: nobody waited for it, or it went wrong


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
    arrived: float = field(default_factory=time.perf_counter)
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


@dataclass(eq=False)
class Row:
    """One answer of a job, while it runs."""

    job: Job
    place: int  # in the job
    session: Session
    writing: Writing


class Worker:
    """The thread, and the queue before it.

    Args:
        load: makes the engine, in the thread.
        queue: the most requests that wait.
        say: takes a line of the log.
        on_ready: called in the thread when the model is loaded, or could not be.
        parallel: answers that run at once.
        cache_bytes: of sessions that wait for requests that go on with them; None: a quarter of
            what the machine has beside the model. cache_size: the most of them.
    """

    def __init__(
        self,
        load: Load,
        queue: int = 64,
        say: Callable[[str], None] = lambda line: None,
        on_ready: Callable[[], None] = lambda: None,
        parallel: int = 1,
        cache_bytes: int | None = None,
        cache_size: int = 32,
    ) -> None:
        self.queue, self.say, self.parallel = queue, say, parallel
        self.engine: Engine | None = None
        self.failure: BaseException | None = None  # why there is no engine
        self.prefixes = Prefixes(cache_bytes or 0, cache_size)
        self.metrics = Metrics()
        self._load, self._on_ready, self._cache_bytes = load, on_ready, cache_bytes
        self._jobs: deque[Job] = deque()
        self._running: list[Job] = []
        self._next: deque[tuple[Job, int]] = deque()  # answers of running jobs that have no place
        self._rows: dict[int, Row] = {}
        self._changed = threading.Condition()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._watched()

    def _watched(self) -> None:
        """What is measured when it is asked for."""
        gauge, kept = self.metrics.gauge, self.prefixes
        gauge("num_requests_running", "Requests in work.", lambda: self.load[0])
        gauge("num_requests_waiting", "Requests in the queue.", lambda: self.load[1])
        gauge("num_answers_running", "Answers in work.", lambda: len(self._rows))
        gauge("prefix_cache_sessions", "Sessions that are kept.", lambda: len(kept))
        gauge("prefix_cache_bytes", "Bytes of the sessions.", lambda: kept.held)
        gauge("prefix_cache_limit_bytes", "The most of them.", lambda: kept.limit)
        gauge("graphs", "Steps traced so far.", lambda: self.engine.graphs if self.engine else 0)
        gauge("memory_active_bytes", "Arrays of MLX, the weights among them.", mx.get_active_memory)
        gauge("memory_cache_bytes", "What MLX keeps for arrays.", mx.get_cache_memory)
        gauge("memory_peak_bytes", "The most of active memory.", mx.get_peak_memory)

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
            return len(self._running), len(self._jobs)

    def slots(self) -> list[dict[str, Any]]:
        """Every answer that runs or waits, in plain numbers; see `Tally.as_dict`."""
        with self._changed:
            queued = [(job, place) for job in self._jobs for place in range(len(job.generations))]
        waiting = [*self._next, *queued]
        rows = list(self._rows.values())
        found = {(row.job.id, row.place): row.writing.tally.as_dict() for row in rows}
        for job, place in waiting:
            told = {"state": "queued", "prompt_tokens": len(job.generations[place].prompt)}
            found.setdefault((job.id, place), told)
        return [{"id": id, "choice": place, **state} for (id, place), state in found.items()]

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
            if len(self._jobs) + len(self._running) >= self.queue + self.parallel:
                self.metrics.refused.inc()
                raise problems.queue_full(len(self._jobs))
            self._jobs.append(job)
            self._changed.notify_all()

    def withdraw(self, job: Job) -> None:
        """Nobody waits for it: out of the queue, or stopped after the running step."""
        job.cancel()
        with self._changed, contextlib.suppress(ValueError):
            self._jobs.remove(job)
            self.metrics.answers.labels(ABORT).inc(len(job.generations))

    def drain(self) -> None:
        """Take no more requests."""
        self._draining = True

    def stop(self) -> None:
        """End every answer after its running step, and the thread."""
        with self._changed:
            self._draining = self._stopped = True
            why = problems.unavailable("the server is shutting down")
            for job in [*self._jobs, *self._running]:
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
            self._together = together.of(engine, self.parallel)
            if self._cache_bytes is None:
                self.prefixes.limit = engine.room() // 4
            self.metrics.gauge("model_info", "What is loaded.", lambda: 1, model_name=engine.name)
            self.engine = engine
        except BaseException as error:
            self.failure = error
        finally:
            self._on_ready()
        while self.engine is not None and self._admit():
            self._begin(self.engine)
            self._drop()
            if self._rows:
                self._step()
        if self.engine is not None:
            self._together.close()

    def _admit(self) -> bool:
        """Take jobs from the queue, which is waited for if nothing runs; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._running or self._stopped)
            while self._jobs and len(self._running) < self.parallel:
                job = self._jobs.popleft()
                self._running.append(job)
                self._next.extend((job, place) for place in range(len(job.generations)))
            return bool(self._running)

    def _begin(self, engine: Engine) -> None:
        """Start answers while there is room."""
        while self._next and len(self._rows) < self.parallel:
            job, place = self._next[0]  # until it runs, whatever ends the job ends it too
            with self._guarded(job, place):
                job.check()
                asked = job.generations[place]
                tally = Tally(self.metrics, len(asked.prompt), job.arrived)
                spell = engine.tokenizer.decode
                writing = Writing(asked, partial(job.deliver, place), tally, spell)
                session = self._take(asked, engine)
                try:
                    progress = partial(_progress, job, writing)
                    number = self._together.insert(asked, session, progress)
                except BaseException:
                    self._give(session)
                    raise
                self._rows[number] = Row(job, place, session, writing)
                self._next.popleft()

    def _take(self, asked: Generation, engine: Engine) -> Session:
        """What is known of a prompt."""
        if not asked.cached:
            return Session()
        tag = asked.sparse_prefill.tag if asked.sparse_prefill is not None else ""
        before = self.prefixes.tokens
        drafted = engine.keeps_rows and asked.draft is not False
        session = self.prefixes.take(asked.prompt, tag, drafted)
        self.metrics.cache_queries.inc(len(asked.prompt))
        self.metrics.cache_hits.inc(self.prefixes.tokens - before)
        return session

    def _give(self, session: Session) -> None:
        """A request left it, for others."""
        before = self.prefixes.evictions
        self.prefixes.give(session)
        self.metrics.cache_evictions.inc(self.prefixes.evictions - before)

    def _drop(self) -> None:
        """Let go of what nobody waits for."""
        for number, row in list(self._rows.items()):
            if number in self._rows:
                with self._guarded(row.job, row.place):
                    row.job.check()

    def _step(self) -> None:
        """The next piece of work, and what comes of it to whoever asked."""
        try:
            found = self._together.next()
        except Exception as error:
            gone = [row for number, row in self._rows.items() if number not in self._together]
            for row in gone or list(self._rows.values()):
                with self._guarded(row.job, row.place):
                    raise error
            return
        if found:
            self.metrics.together.observe(len({number for number, _ in found}))
        for number, response in found:
            if number not in self._rows:
                continue  # it ended within this step
            own = self._rows[number]
            with self._guarded(own.job, own.place):
                if (end := own.writing.take(response)) is not None:
                    self._ended(number, end.reason)
                    self._finished(own.job)

    @contextlib.contextmanager
    def _guarded(self, job: Job, place: int) -> Iterator[None]:
        """Nothing that goes wrong in one job ends the thread, or another job."""
        try:
            yield
        except Cancelled:
            self._leave(job, ABORT)
        except problems.Problem as problem:
            self._fail(job, place, problem)
        except OptionError as error:
            self._fail(job, place, problems.of_option(error))
        except Exception as error:
            self.metrics.errors.inc()
            self.say(f"{job.id}: {place_of(error)}")
            self._fail(job, place, problems.internal(job.id))

    def _fail(self, job: Job, place: int, problem: problems.Problem) -> None:
        with contextlib.suppress(Exception):  # whoever asked may be gone
            job.deliver(place, Failed(problem.wrong))
        self._leave(job, ERROR)

    def _leave(self, job: Job, why: str) -> None:
        """All answers of a job end."""
        for number, row in list(self._rows.items()):
            if row.job is job:
                self._ended(number, why)
        others = deque((other, place) for other, place in self._next if other is not job)
        self.metrics.answers.labels(why).inc(len(self._next) - len(others))
        self._next = others
        self._finished(job)

    def _ended(self, number: int, why: str) -> None:
        """An answer ended: its session is there for others."""
        row = self._rows.pop(number)
        if number in self._together:
            self._together.remove(number)
        row.writing.tally.ended(why)
        if row.writing.asked.cached:
            self._give(row.session)

    def _finished(self, job: Job) -> None:
        """A job that has no more answers runs no more."""
        if any(row.job is job for row in self._rows.values()):
            return
        if any(other is job for other, _ in self._next):
            return
        with self._changed, contextlib.suppress(ValueError):
            self._running.remove(job)


def _progress(job: Job, writing: Writing, done: int, total: int) -> None:
    job.check()
    writing.progress(done, total)


def _warm_up(engine: Engine) -> None:
    """The first answer compiles the steps: nobody shall wait for that."""
    prompt = list(engine.tokenizer.encode("Hi"))
    asked = Generation(prompt, SamplingParams(), max_tokens=8)
    for _ in engine.answer(asked, Session(), lambda done, total: None):
        pass


def place_of(error: BaseException) -> str:
    """What went wrong and where, without the error's text: that may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{at}"
