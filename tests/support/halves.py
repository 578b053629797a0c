"""Cases of which the quick tests run one half."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def half_slow(cases: Iterable[Any]) -> list[Any]:
    """Every second one is for the slow tests."""
    return [pytest.param(c, marks=[pytest.mark.slow] * (i % 2)) for i, c in enumerate(cases)]
