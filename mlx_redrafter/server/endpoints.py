"""What is done for every path: read, check, ask the engine thread, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

import mlx_redrafter
from mlx_redrafter.server import models, problems
from mlx_redrafter.server.answering import EventStream, Mailbox, gathered, gone, pieces
from mlx_redrafter.server.bodies import json_body
from mlx_redrafter.server.conversation import conversation
from mlx_redrafter.server.engine import Engine
from mlx_redrafter.server.events import Event, Failed, Finished
from mlx_redrafter.server.fields import Body, Options, generation, parse, refuse_model
from mlx_redrafter.server.metrics import TEXT
from mlx_redrafter.server.problems import TOO_LONG, Problem, invalid
from mlx_redrafter.server.prompts import (
    Talk,
    grammar_of_talk,
    grammar_of_text,
    of_talk,
    of_text,
)
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.settings import Settings
from mlx_redrafter.server.wire.dialect import Dialect
from mlx_redrafter.server.wire.messages import MessagesAnswer, MessagesBody
from mlx_redrafter.server.wire.openai_chat import ChatAnswer, ChatBody
from mlx_redrafter.server.wire.openai_text import TextAnswer, TextBody
from mlx_redrafter.server.wire.responses import ResponsesAnswer, ResponsesBody
from mlx_redrafter.server.worker import Job, Worker, place_of

T = TypeVar("T")
Say = Callable[[str], None]


class Tokens(Body):
    """A request of ``/detokenize``."""

    tokens: list[int]


class Endpoints:
    """The handlers.

    Args:
        worker: the engine thread.
        settings: of the server.
        say: takes a line of the log.
    """

    def __init__(self, worker: Worker, settings: Settings, say: Say) -> None:
        self.worker, self.settings, self.say = worker, settings, say
        # Templates and tokenizers are slow for long prompts, and not made for several threads.
        self._texts = ThreadPoolExecutor(1, "text")

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        body, engine = await self._body(request)
        asked = parse(ChatBody, body)
        asked.check(body)
        refuse_model(asked.model, self.settings, engine)
        generations = await self._of_talk(engine, asked, asked.talk, asked.n)
        dialect = ChatAnswer(asked.model or engine.name, fingerprint(), asked)
        return await self.answer(request, generations, dialect, asked.stream)

    async def _of_talk(
        self, engine: Engine, asked: Options, talk: Callable[[], Talk], answers: int = 1
    ) -> list[Generation]:
        def prepare() -> list[Generation]:
            wanted = talk()
            prompt, reading = of_talk(engine, self.settings, wanted)
            grammar = grammar_of_talk(engine, self.settings, wanted, prompt)
            return [
                generation(asked, self.settings, engine, prompt, reading, ahead, grammar)
                for ahead in range(answers)
            ]

        return await self._prepared(prepare)

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        body, engine = await self._body(request)
        asked = parse(TextBody, body)
        asked.check(body)
        refuse_model(asked.model, self.settings, engine)

        def prepare() -> list[Generation]:
            grammar = grammar_of_text(engine, asked.form)
            return [
                generation(asked, self.settings, engine, prompt, ahead=ahead, grammar=grammar)
                for prompt in [of_text(engine, text) for text in asked.prompts()]
                for ahead in range(asked.n)
            ]

        generations = await self._prepared(prepare)
        dialect = TextAnswer(asked.model or engine.name, fingerprint(), asked)
        return await self.answer(request, generations, dialect, asked.stream)

    async def messages(self, request: Request) -> Response:
        """``/v1/messages``."""
        body, engine = await self._body(request)
        asked = parse(MessagesBody, body)
        refuse_model(asked.model, self.settings, engine)
        generations = await self._of_talk(engine, asked, asked.talk)
        dialect = MessagesAnswer(asked.model or engine.name, len(generations[0].prompt))
        return await self.answer(request, generations, dialect, asked.stream)

    async def count_tokens(self, request: Request) -> Response:
        """``/v1/messages/count_tokens``."""
        body, engine = await self._body(request)
        generations = await self._of_talk(engine, asked := parse(MessagesBody, body), asked.talk)
        return JSONResponse({"input_tokens": len(generations[0].prompt)})

    async def responses(self, request: Request) -> Response:
        """``/v1/responses``."""
        body, engine = await self._body(request)
        asked = parse(ResponsesBody, body)
        asked.check(body)
        refuse_model(asked.model, self.settings, engine)
        dialect = ResponsesAnswer(asked.model or engine.name, asked)
        try:
            generations = await self._of_talk(engine, asked, asked.talk)
        except Problem as problem:
            if not asked.stream or problem.wrong.code != TOO_LONG:
                raise
            # Codex knows it as an event only, and would try again after a status.
            told = dialect.opening() + dialect.failed(problem.wrong)
            return Response(b"".join(told), media_type="text/event-stream")
        return await self.answer(request, generations, dialect, asked.stream)

    async def tokenize(self, request: Request) -> Response:
        """``/tokenize``, llama.cpp's and vLLM's: a text, or messages."""
        body, engine = await self._body(request)
        ids = await self._prepared(lambda: self._ids(engine, body))
        counts = {"count": len(ids), "max_model_len": engine.context}
        return JSONResponse({"tokens": ids, **counts})

    def _ids(self, engine: Engine, body: dict[str, Any]) -> list[int]:
        if isinstance(messages := body.get("messages"), list):
            return of_talk(engine, self.settings, Talk(conversation(messages)))[0]
        text = body.get("content", body.get("prompt"))
        if not isinstance(text, str):
            raise invalid("content is not possible: give a text, or messages", "content")
        special = body.get("add_special", body.get("add_special_tokens", False))
        return [int(i) for i in engine.tokenizer.encode(text, add_special_tokens=bool(special))]

    async def detokenize(self, request: Request) -> Response:
        """``/detokenize``."""
        body, engine = await self._body(request)
        tokens = parse(Tokens, body).tokens
        if any(not 0 <= token < engine.vocab_size for token in tokens):
            raise invalid(f"tokens: use 0 to {engine.vocab_size - 1}", "tokens")
        text = await self._prepared(lambda: str(engine.tokenizer.decode(tokens)))
        return JSONResponse({"content": text, "prompt": text})

    async def apply_template(self, request: Request) -> Response:
        """``/apply-template``: the prompt that messages become."""
        body, engine = await self._body(request)
        asked = parse(ChatBody, body)

        def written() -> str:
            ids, _ = of_talk(engine, self.settings, asked.talk())
            return str(engine.tokenizer.decode(ids))

        return JSONResponse({"prompt": await self._prepared(written)})

    async def list_models(self, request: Request) -> Response:
        """``/v1/models``, in either dialect."""
        engine = self.worker.available()
        anthropic = "anthropic-version" in request.headers
        return JSONResponse(models.listed(engine, anthropic))

    async def model(self, request: Request) -> Response:
        """``/v1/models/{id}``."""
        engine, name = self.worker.available(), request.path_params["name"]
        if name != engine.name:
            raise Problem(
                f"there is no model {name[:100]!r} here: use {engine.name!r}",
                status=404, kind="not_found_error", code="model_not_found",
            )  # fmt: skip
        anthropic = "anthropic-version" in request.headers
        return JSONResponse(models.one(engine, anthropic))

    async def health(self, request: Request) -> Response:
        """``/health``: does the engine thread live?"""
        if not self.worker.alive:
            return JSONResponse({"status": "unavailable"}, 503)
        status = "ok" if self.worker.engine is not None else "loading"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def ready(self, request: Request) -> Response:
        """``/ready``: would a request be answered now?"""
        self.worker.available()
        running, waiting = self.worker.load
        return JSONResponse({"status": "ready", "running": running, "waiting": waiting})

    async def metrics(self, request: Request) -> Response:
        """``/metrics``, as Prometheus reads it."""
        return Response(self.worker.metrics.page(), media_type=TEXT)

    async def slots(self, request: Request) -> Response:
        """``/slots``: what every answer that runs or waits does now, without its text."""
        running, waiting = self.worker.load
        head = {"running": running, "waiting": waiting, "parallel": self.worker.parallel}
        return JSONResponse({**head, "slots": self.worker.slots()})

    async def not_here(self, request: Request) -> Response:
        """What other servers have."""
        raise Problem(
            f"{request.url.path} is not supported: this server makes text only",
            status=501, kind="not_supported_error",
        )  # fmt: skip

    async def _body(self, request: Request) -> tuple[dict[str, Any], Engine]:
        """The request, and the engine that will answer it."""
        body = await json_body(request, self.settings)
        return body, self.worker.available()

    async def _prepared(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    async def answer(
        self, request: Request, generations: Sequence[Generation], dialect: Dialect, stream: bool
    ) -> Response:
        """Have the answers made. Raises Problem, and ClientDisconnect."""
        box, rows = Mailbox(), len(generations)
        job = Job(request.state.request_id, generations, box.deliver)
        record = Record(request.url.path, job.id, self.say if self.settings.log_requests else None)
        self.worker.submit(job)

        def end() -> None:
            self.worker.withdraw(job)
            record.close()

        if stream:
            content = pieces(box, dialect, rows, self.settings.keep_alive, record.note)
            safe = self._safe(content, dialect, job.id)
            return EventStream(safe, end, self.settings.write_seconds)
        answers = asyncio.ensure_future(gathered(box, rows, record.note))
        left = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait({answers, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise ClientDisconnect
            return JSONResponse(dialect.whole(answers.result()))
        finally:
            answers.cancel()
            left.cancel()
            end()

    async def _safe(
        self, content: AsyncIterator[bytes], dialect: Dialect, request_id: str
    ) -> AsyncIterator[bytes]:
        """The same; a fault of ours is told in the stream."""
        try:
            async for piece in content:
                yield piece
        except Exception as error:
            self.say(f"{request_id}: {place_of(error)}")
            for piece in dialect.failed(problems.internal(request_id).wrong):
                yield piece


class Record:
    """The line of the log about one request: sizes, counts and times, never a text."""

    def __init__(self, path: str, request_id: str, say: Say | None) -> None:
        self.path, self.id, self.say = path, request_id, say
        self.start = time.perf_counter()
        self.read = self.written = 0
        self.end = "left"

    def note(self, row: int, event: Event) -> None:
        """An event of an answer."""
        if isinstance(event, Finished):
            self.read += event.usage.prompt
            self.written += event.usage.completion
            self.end = event.reason
        elif isinstance(event, Failed):
            self.end = f"failed with {event.wrong.status}"

    def close(self) -> None:
        """The request is over."""
        if self.say is None:
            return
        seconds = time.perf_counter() - self.start
        self.say(
            f"{self.id} {self.path}: prompt {self.read} tokens, answer {self.written} tokens, "
            f"{seconds:.2f} s, {self.end}"
        )


def fingerprint() -> str:
    """Of the program that makes the answers."""
    return f"mlx-redrafter-{mlx_redrafter.__version__}-mlx-{version('mlx')}"
