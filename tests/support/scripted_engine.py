"""A model that writes what a test tells it to, behind the real HTTP server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conftest import ByteTokenizer

from mlx_redrafter.cache.session import Session
from mlx_redrafter.errors import OptionError
from mlx_redrafter.prefill.reading import Progress
from mlx_redrafter.server.engine import Responses
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.running import Server
from mlx_redrafter.server.settings import Settings
from mlx_redrafter.server.worker import Worker
from mlx_redrafter.text.answer import Answer
from mlx_redrafter.text.grammar import Source, quoted
from mlx_redrafter.tree.shape import BEAMS, TEXT
from mlx_redrafter.tree.told import ToldNode, ToldTree


class ChatBytes(ByteTokenizer):
    """Bytes as tokens, with a chat template that is easy to read in an assertion."""

    has_chat_template = True
    has_thinking = False
    think_start: str | None = None
    think_end: str | None = None
    tool_parser: Any = None
    tool_call_start: str | None = None
    tool_call_end: str | None = None
    chat_template = "[ROLE]CONTENT"
    refuses_system = False

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **more: Any,
    ) -> Any:
        if self.refuses_system and messages[0]["role"] == "system":
            raise ValueError("no system messages")
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        text += "[assistant]" * add_generation_prompt
        self.last = {"messages": list(messages), "text": text, **more}
        return self.encode(text, add_special_tokens=False) if tokenize else text


@dataclass
class ScriptedGrammars:
    """Keeps what it is asked for, and refuses what llguidance would."""

    found: list[Any]

    def marked(self, text: str) -> str:
        return quoted(text)

    def compiled(self, *sources: Source, **more: Any) -> Any:
        from llguidance import LLMatcher

        for source in sources:
            wrong = LLMatcher.validate_grammar(json.dumps({"grammars": [source]}))
            if wrong and not wrong.startswith("WARNING"):
                raise OptionError(f"the grammar is not possible ({wrong.splitlines()[0]})")
        self.found.append((sources, more))
        return self


@dataclass
class ScriptedEngine:
    """Answers with texts in turn, some bytes per step, at a pace.

    Args:
        texts: the answers, the last one again and again; or made of the prompt's text.
        step: tokens of a step.
        pause: seconds of a step, and of a part of the prompt.
        chunk: prompt tokens of a part.
    """

    texts: Sequence[str] | Callable[[str], str] = ("Hello there.",)
    step: int = 5
    pause: float = 0.0
    chunk: int = 64
    name: str = "scripted"
    context: int = 1000
    vocab_size: int = ByteTokenizer.vocab_size
    loaded: float = 1e9
    facts: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    keeps_rows: bool = False
    graphs: int = 0
    tokenizer: Any = field(default_factory=ChatBytes)
    asked: list[Generation] = field(default_factory=list)
    steps: int = 0  # so far, over all answers
    parts: int = 0
    compiled: list[Any] = field(default_factory=list)  # grammars that requests had
    closed: int = 0  # answers that were ended by whoever asked
    before_step: Callable[[int], object] = lambda step: None

    def grammars(self) -> Any:
        return ScriptedGrammars(self.compiled)

    def room(self) -> int:
        return 1 << 20

    def answer(self, asked: Generation, session: Session, progress: Progress) -> Responses:
        return self._answer(asked, progress)

    def _answer(self, asked: Generation, progress: Progress) -> Responses:
        if self.warmed:
            self.asked.append(asked)
        self.warmed = True
        total = len(asked.prompt)
        for done in range(0, total, self.chunk):
            progress(done, total)
            self.parts += 1
            time.sleep(self.pause)
        progress(total, total)
        answer = Answer(
            self.tokenizer, total, asked.stop, self.tokenizer.eos_token_ids, asked.max_tokens
        )
        answer.stats.prefill_tokens = total
        tokens = [*self._text(asked).encode(), ByteTokenizer.EOS]
        try:
            for at in range(0, len(tokens), self.step):
                time.sleep(self.pause)
                self.before_step(self.steps)
                self.steps += 1
                step = tokens[at : at + self.step]
                answer.stats.record(len(step), drafted=self.step)
                answer.stats.decode_seconds += self.pause
                tree = _tree(asked.prompt[-1] if at == 0 else tokens[at - 1], step)
                for i, token in enumerate(step):
                    given = tree if asked.trees and i == 0 else None
                    response = answer.add(token, from_draft=i < len(step) - 1, tree=given)
                    yield response
                    if response.finish_reason is not None:
                        return
        except GeneratorExit:
            self.closed += 1
            raise

    warmed: bool = False

    def says(self, *texts: str, step: int = 5, pause: float = 0.0) -> None:
        """The next answers."""
        self.texts, self.step, self.pause = texts, step, pause
        self.asked.clear()
        self.before_step = lambda step: None

    def _text(self, asked: Generation) -> str:
        if callable(self.texts):
            return self.texts(self.tokenizer.decode(list(asked.prompt)))
        return self.texts[min(len(self.asked), len(self.texts)) - 1] if self.asked else ""


def _tree(root: int, step: Sequence[int]) -> ToldTree:
    """One that a step might have had: a wrong draft beside every right one, and one that was not
    checked."""
    nodes = [ToldNode(root, -1, 0.0, "", True, True, step[0])]
    for depth, token in enumerate(step[:-1], 1):
        above = len(nodes) - 2 if depth > 1 else 0
        nodes.append(ToldNode(token, above, 0.25 * depth, BEAMS, True, True, step[depth]))
        nodes.append(ToldNode(ord("?"), above, 1.5 + depth, TEXT, depth == 1, False, None))
    return ToldTree(tuple(nodes), step[-1])


@dataclass
class Running:
    """A server in a thread."""

    url: str
    port: int
    engine: Any
    worker: Worker
    server: Server
    log: list[str]

    def wait(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Until a condition holds; AssertionError if it never does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came about"
            time.sleep(0.005)

    def idle(self) -> None:
        """Until nothing runs or waits."""
        self.wait(lambda: self.worker.load == (0, 0))


@contextlib.contextmanager
def running(engine: Any, send_buffer: int = 0, **settings: Any) -> Iterator[Running]:
    """The real server over an engine, on a port of its own; ``send_buffer``: bytes that the machine
    keeps for a client which does not read."""
    given, log = Settings(**{"port": 0, "grace": 2.0, "parallel": 1, **settings}), list[str]()
    ready = threading.Event()
    worker = Worker(lambda: engine, given.queue, log.append, ready.set, given.parallel)
    server = Server(worker, given, log.append)
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    worker.start()
    thread.start()
    assert ready.wait(30)
    assert worker.failure is None
    try:
        yield Running(f"http://127.0.0.1:{port}", port, engine, worker, server, log)
    finally:
        server.should_exit = True
        worker.stop()
        thread.join(20)
        assert worker.join(20)
        assert not thread.is_alive()
