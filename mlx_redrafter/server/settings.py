"""How a server was started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.tree.shape import TreeShape

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Options of a server.

    Args:
        host, port: where it listens; port 0: any that is free.
        api_key: what clients must send; None: nothing, which needs a loopback address.
        allowed_origins: of web pages besides those on this machine; ``*`` for all.
        allowed_hosts: names besides those of this machine.
        parallel: answers that run at once.
        queue: requests that may wait.
        cache_bytes: of sessions that are kept for requests that begin alike; None: a quarter of
            what the machine has beside the model. cache_size: the most of them.
        max_tokens: of an answer, where a request does not say; None: to the end of the context.
        sampling: by the names of `SamplingParams`, where a request does not say.
        template: variables of the chat template.
        tool_parser: name of one; None: found from the chat template.
        reasoning: ``deepseek``: thoughts in a field of their own; ``inline``: in the text;
            ``off``: as deepseek, and the template is asked not to think.
        tree: how much to draft; None: what pays.
        sparse_prefill: how long prompts are read; None: densely.
        strict_model: a request for a model of another name is refused.
        page: show a page to browsers.
        grace: seconds for running answers after the signal to end.
        log_requests: a line for every request: sizes, counts and times.
        body_limit: bytes of a request.
        body_seconds, write_seconds: for receiving a request, and for a client to take a piece.
        keep_alive: seconds without an event after which a stream says that it lives.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    parallel: int = 8
    queue: int = 64
    cache_bytes: int | None = None
    cache_size: int = 32
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    tool_parser: str | None = None
    reasoning: Literal["off", "deepseek", "inline"] = "deepseek"
    tree: TreeShape | None = None
    sparse_prefill: SparsePrefill | None = None
    strict_model: bool = False
    page: bool = True
    grace: float = 10.0
    log_requests: bool = False
    body_limit: int = 32 * MIB
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    keep_alive: float = 10.0
