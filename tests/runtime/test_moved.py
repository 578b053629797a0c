"""Old module names are the new modules, with a warning; other names are nothing."""

from __future__ import annotations

import importlib
import sys

import pytest

from mlx_redrafter.runtime.moved import NAMES, PACKAGE


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_is_the_module_itself(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, PACKAGE + old, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now mlx_redrafter\.{NAMES[old]}$"):
        found = importlib.import_module(PACKAGE + old)
    assert found is importlib.import_module(PACKAGE + NAMES[old])


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{PACKAGE}nothing")
