"""Modules that had another name in version 0.1 and, for one release, are found under it too."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "mlx_redrafter."
NAMES = {
    "blas": "runtime.blas",
    "console": "terminal.console",
    "conversation": "cli.conversation",
    "decoding.tree": "tree.shape",
    "drafters.redrafter": "drafters.recurrent",
    "info": "cli.info",
    "prefill.session": "cache.session",
    "prompts": "evaluation.prompts",
    "training.batched": "models.batched",
    "training.command": "cli.train",
    "training.evaluate": "evaluation.positions",
}


class _Moved(MetaPathFinder, Loader):
    """Asked last, for names that are no file any more."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.removeprefix(PACKAGE) not in NAMES or not name.startswith(PACKAGE):
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = PACKAGE + NAMES[spec.name.removeprefix(PACKAGE)]
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        pass


def find_under_old_names() -> None:
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
