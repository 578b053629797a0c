"""What to write into the settings of a client, so that it talks with this server."""

from __future__ import annotations

import json
import textwrap

from mlx_redrafter.errors import OptionError

KEY = "MLX_REDRAFTER_API_KEY"  # the variable that the server reads too


def client_settings(client: str, url: str, model: str, key: str = "x") -> str:
    """The text for one of `CLIENTS`. Raises OptionError.

    Args:
        url: of the server, without a path.
        model: as the client shall name it.
        key: what it shall send; any where the server asks for none.
    """
    if client not in CLIENTS:
        raise OptionError(f"there is no client {client!r}: use one of {', '.join(sorted(CLIENTS))}")
    opencode = {
        "model": f"mlxr/{model}",
        "small_model": f"mlxr/{model}",
        "provider": {
            "mlxr": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "mlx-redrafter",
                "options": {"baseURL": f"{url}/v1", "apiKey": key},
                "models": {model: {"name": model}},
            }
        },
    }
    zed = {
        "language_models": {
            "openai_compatible": {
                "mlx-redrafter": {
                    "api_url": f"{url}/v1",
                    "available_models": [
                        {"name": model, "max_tokens": 32768, "capabilities": {"tools": True}}
                    ],
                }
            }
        }
    }
    asked = key != "x"
    names = {"URL": url, "MODEL": model, "KEY": key}
    # These two take the name of a variable, or of a stored key, and not the key itself.
    names |= {"CODEX": f'env_key = "{KEY}"' if asked else ""}
    names |= {"STORED": "\n  api_key_name: redrafter  # llm keys set redrafter" if asked else ""}
    names |= {"OPENCODE": json.dumps(opencode, indent=2), "ZED": json.dumps(zed, indent=2)}
    text = textwrap.dedent(CLIENTS[client]).strip()
    for name, value in names.items():
        text = text.replace(f"${name}", value)
    return text.rstrip()


CLIENTS = {
    "codex": """
        # ~/.codex/config.toml
        model = "$MODEL"
        model_provider = "mlxr"
        web_search = "disabled"

        [model_providers.mlxr]
        name = "mlx-redrafter"
        base_url = "$URL/v1"
        wire_api = "responses"
        $CODEX
        """,
    "claude": """
        # before `claude`, in the same shell
        export ANTHROPIC_BASE_URL=$URL
        export ANTHROPIC_AUTH_TOKEN=$KEY
        export ANTHROPIC_MODEL=$MODEL
        export ANTHROPIC_DEFAULT_HAIKU_MODEL=$MODEL
        export ANTHROPIC_SMALL_FAST_MODEL=$MODEL
        export CLAUDE_CODE_ATTRIBUTION_HEADER=0
        """,
    "opencode": """
        // opencode.json
        $OPENCODE
        """,
    "aider": """
        aider --openai-api-base $URL/v1 --openai-api-key $KEY --model openai/$MODEL
        """,
    "continue": """
        # ~/.continue/config.yaml
        models:
          - name: mlx-redrafter
            provider: openai
            model: $MODEL
            apiBase: $URL/v1
            apiKey: $KEY
        """,
    "zed": """
        // settings.json
        $ZED
        """,
    "open-webui": """
        # environment of Open WebUI
        OPENAI_API_BASE_URL=$URL/v1
        OPENAI_API_KEY=$KEY
        """,
    "llm": """
        # extra-openai-models.yaml in the folder that `llm logs path` shows
        - model_id: redrafter
          model_name: $MODEL
          api_base: "$URL/v1"$STORED
        """,
}
