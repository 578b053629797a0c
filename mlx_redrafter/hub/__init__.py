"""Where models come from: folders, the hub, the built-in one; and what lies in a model's folder."""

from __future__ import annotations

from mlx_redrafter.hub.folders import find_drafter, resolve
from mlx_redrafter.text.tokenizer import load_tokenizer

__all__ = ["find_drafter", "load_tokenizer", "resolve"]
