"""Lists of models: there is one."""

from __future__ import annotations

import time
from typing import Any

from mlx_redrafter.server.engine import Engine


def one(engine: Engine, anthropic: bool) -> dict[str, Any]:
    """A model in OpenAI's or Anthropic's form."""
    if anthropic:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(engine.loaded))
        named = {"id": engine.name, "display_name": engine.name}
        return {"type": "model", **named, "created_at": at}
    return {
        "id": engine.name,
        "object": "model",
        "created": int(engine.loaded),
        "owned_by": "mlx-redrafter",
        "max_model_len": engine.context,
        "meta": engine.facts,
    }


def listed(engine: Engine, anthropic: bool) -> dict[str, Any]:
    """All models."""
    data = [one(engine, anthropic)]
    if anthropic:
        return {"data": data, "has_more": False, "first_id": engine.name, "last_id": engine.name}
    return {"object": "list", "data": data}
