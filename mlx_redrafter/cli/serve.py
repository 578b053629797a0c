"""`mlx-redrafter serve`: a model over HTTP. Every option is an environment variable too."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlx_redrafter.cli import options as shared
from mlx_redrafter.cli.machines import MachineOptions
from mlx_redrafter.cli.options import ModelOptions
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console

if TYPE_CHECKING:
    from mlx_redrafter.server.settings import Settings

ANSWERS, ACCESS = "Answers, where a request does not say", "Access"
ENVIRONMENT = "MLX_REDRAFTER"


def _answer(text: str, shown: str = "the model's own") -> Any:
    return typer.Option(rich_help_panel=ANSWERS, show_default=shown, help=text)


@dataclass(frozen=True)
class ServeOptions:
    """How to serve."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; others than 127.0.0.1 need a key.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.")] = 8080
    parallel: Annotated[int, typer.Option(help="Answers that run at once.")] = 8
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 64
    prompt_cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for prompts that may come again, such as 2G; 0: none.",
            show_default="a quarter of what is free beside the model",
        ),
    ] = None
    prompt_cache_size: Annotated[int, typer.Option(help="The most such prompts.")] = 32
    context: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt and answer together, in tokens.", show_default="the model's own"
        ),
    ] = None
    grace: Annotated[
        float, typer.Option(help="Seconds that answers have to end after a signal.")
    ] = 10.0
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="A line for every request, without its text.")
    ] = False
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in a browser when the model is loaded.")
    ] = False
    no_ui: Annotated[bool, typer.Option("--no-ui", help="No page, the API alone.")] = False
    show_config: Annotated[
        str | None,
        typer.Option(
            metavar="CLIENT",
            help="Print the settings of a client for this server, and end: codex, claude, "
            "opencode, aider, continue, zed, open-webui or llm.",
        ),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(rich_help_panel=ACCESS, help="Clients must send this key.")
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=ACCESS, callback=expanded, help="File with the key in its first line."
        ),
    ] = None
    allowed_origins: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=ACCESS,
            metavar="URL,...",
            help="Web pages that may send requests; * for all.",
            show_default="those on this machine",
        ),
    ] = None
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=ACCESS,
            metavar="NAME,...",
            help="More names of this machine.",
        ),
    ] = None
    strict_model: Annotated[
        bool,
        typer.Option(
            "--strict-model",
            rich_help_panel=ACCESS,
            help="Refuse requests for a model of another name.",
        ),
    ] = False
    max_tokens: Annotated[
        int | None, _answer("Longest answer, in tokens; -1: no limit.", "to the end of the context")
    ] = None
    temp: Annotated[float | None, _answer("0 takes the likeliest token; more varies.")] = None
    top_p: Annotated[float | None, _answer("Keep the likeliest up to this share; 0: off.")] = None
    top_k: Annotated[int | None, _answer("Keep this many of the likeliest; 0: off.")] = None
    min_p: Annotated[
        float | None, _answer("Drop tokens less likely than this share of the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float | None, _answer("Make used tokens less likely; 1 is off.")
    ] = None
    presence_penalty: Annotated[
        float | None, _answer("Subtracted from logits of used tokens.", "off")
    ] = None
    frequency_penalty: Annotated[
        float | None, _answer("Subtracted from a logit for every use.", "off")
    ] = None
    chat_template_config: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=ANSWERS, metavar="JSON", help="Variables for the chat template."
        ),
    ] = None
    tool_parser: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=ANSWERS,
            metavar="NAME",
            help="How the model writes calls of tools.",
            show_default="found from the chat template",
        ),
    ] = None
    reasoning: Annotated[
        Literal["off", "deepseek", "inline"],
        typer.Option(
            rich_help_panel=ANSWERS,
            metavar="MODE",
            help="deepseek: thoughts in a field of their own; inline: in the text; off: ask the "
            "template not to think.",
        ),
    ] = "deepseek"
    sparse_prefill: shared.SparseMode = "off"
    sparse_prefill_config: shared.SparseConfig = None
    sparse_prefill_min_context: shared.SparseMinContext = 32768
    sparse_prefill_tau: shared.SparseTau = 0.9

    def settings(self) -> Settings:
        """Of the server; raises OptionError."""
        from mlx_redrafter.decoding.request import length
        from mlx_redrafter.decoding.sampling import SamplingParams
        from mlx_redrafter.server.settings import Settings
        from mlx_redrafter.text.template import parse_config

        checks.whole("--port", self.port, 0, 65535)
        checks.at_least(0, queue=self.queue, prompt_cache_size=self.prompt_cache_size)
        checks.at_least(1, parallel=self.parallel)
        checks.at_least(2, context=self.context)
        grace = checks.number("--grace", self.grace, 0, 86400)
        if self.open_page and self.no_ui:
            raise OptionError("--open shows the page, and --no-ui leaves it out: give one of them")
        names = ("temp", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty")  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        sampling = {name: value for name, value in given.items() if value is not None}
        SamplingParams(**sampling)
        sparse = shared.sparse_prefill(
            self.sparse_prefill,
            self.sparse_prefill_config,
            self.sparse_prefill_min_context,
            self.sparse_prefill_tau,
        )
        return Settings(
            host=self.host,
            port=self.port,
            api_key=self._key(),
            allowed_origins=_listed(self.allowed_origins),
            allowed_hosts=tuple(name.lower() for name in _listed(self.allowed_hosts)),
            parallel=self.parallel,
            queue=self.queue,
            cache_bytes=_size(self.prompt_cache_bytes),
            cache_size=self.prompt_cache_size,
            max_tokens=None if self.max_tokens is None else length(self.max_tokens),
            sampling=sampling,
            template=parse_config(self.chat_template_config),
            tool_parser=self.tool_parser,
            reasoning=self.reasoning,
            sparse_prefill=sparse,
            strict_model=self.strict_model,
            page=not self.no_ui,
            grace=grace,
            log_requests=self.log_requests,
        )

    def _key(self) -> str | None:
        if self.api_key is not None and self.api_key_file is not None:
            raise OptionError("--api-key and --api-key-file are both given: give one of them")
        key = self.api_key
        if self.api_key_file is not None:
            try:
                with self.api_key_file.open(encoding="utf-8") as file:
                    key = file.readline(4096).strip()
            except (OSError, UnicodeError) as error:
                why = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise OptionError(f"{self.api_key_file} cannot be read ({why})") from None
        if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
            raise OptionError("the API key is empty or not ASCII: give letters, digits and signs")
        return key


def command(*, source: ModelOptions, options: ServeOptions, machines: MachineOptions) -> None:
    """Serve a model over HTTP, in the dialects of OpenAI and Anthropic.

    Every option can also be set by an environment variable: MLX_REDRAFTER_PORT for --port.
    """
    _check_installed()
    settings = options.settings()
    from mlx_redrafter.server.tools import check_format

    check_format(options.tool_parser)
    if options.show_config is not None:
        _show(options.show_config, source.model, settings)
        return
    with machines.joined() as there:
        _serve(source, options, settings, there)


command.context_settings = {"auto_envvar_prefix": ENVIRONMENT}  # type: ignore[attr-defined]


def _serve(source: ModelOptions, options: ServeOptions, settings: Settings, there: Any) -> None:
    from mlx_redrafter.server.engine import Engine, ModelEngine
    from mlx_redrafter.server.running import serve

    def show(address: str) -> None:
        import webbrowser

        if not webbrowser.open(address):
            console.note(f"no browser was found: open {address} in one")

    def load() -> Engine:
        model, tokenizer = source.load(settings.tree, there)
        engine = ModelEngine(model, tokenizer, options.context)
        if warning := engine.warning():
            console.warn(warning)
        return engine

    serve(load, settings, console.note, show if options.open_page else None)


def _show(client: str, model: str, settings: Settings) -> None:
    from mlx_redrafter.server.clients import client_settings

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    name = os.path.basename(model.rstrip("/")) or model
    key = "YOUR-KEY" if settings.api_key is not None else "x"  # no secret of theirs on a screen
    typer.echo(client_settings(client, f"http://{host}:{settings.port}", name, key))


def _size(text: str | None) -> int | None:
    """Bytes of a size such as 2G, 500M or 0; raises OptionError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise OptionError(
            f"--prompt-cache-bytes {text} is no size: give a number with K, M, G or T, such as 2G"
        )
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def _check_installed() -> None:
    """Raises OptionError where the server's packages are missing."""
    import importlib.util

    needed = ("starlette", "uvicorn", "pydantic", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"serve needs {' and '.join(missing)}: pip install 'mlx-redrafter[serve]'"
        )
