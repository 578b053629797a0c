"""Imports point one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import mlx_redrafter
import mlx_redrafter.convert

PACKAGE = Path(mlx_redrafter.__file__).parent
# In an editable installation it lies outside the package.
CONVERT = Path(mlx_redrafter.convert.__file__).parent

# A module may import those of its own row and of the rows above it.
LAYERS = [
    {"errors", "checks", "stats", "blas", "kernels", "threads", "clock", "paths", "terminal"},
    {"models", "drafters"},
    {"prefill"},
    {"decoding"},
    {
        "api",
        "arguments",
        "chat_template",
        "tuning",
        "hub",
        "kept",
        "builtin",
        "gguf",
        "gguf_blocks",
        "gguf_file",
        "gguf_model",
        "gguf_tokenizer",
        "gguf_rope",
        "gguf_values",
        "turn_ends",
    },
    {
        "console",
        "net",
        "options",
        "flat_options",
        "conversation",
        "chat",
        "generating",
        "answer_writer",
        "info",
        "doctor",
        "model_checks",
        "demo",
        "exactness",
        "acceptance",
        "prompts",
        "replay",
        "figures",
        "tune",
        "reports",
        "lanes",
        "race",
        "race_screen",
        "waiting",
        "prefill_search",
        "haystack",
        "needles",
    },
    {"convert", "training"},
    {"bench", "counts", "prefill_bench"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(source: str, package: str = "mlx_redrafter") -> set[str]:
    """Our own top-level modules that `source`, a file of `package`, imports when it runs."""
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else []), *filter(None, (node.module or "").split("."))]
            if parts == ["mlx_redrafter"]:
                names |= {alias.name for alias in node.names}
            elif parts[0] == "mlx_redrafter":
                names.add(parts[1])
        elif isinstance(node, ast.Import):
            names |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith("mlx_redrafter.")
            }
    return names


def violations(module: str, source: str, package: str = "mlx_redrafter") -> list[str]:
    """Imports of `source`, the text of top-level module `module`, that point to a later layer."""
    return [
        f"{module} imports {name}"
        for name in sorted(imported(source, package) & RANK.keys() - {module})
        if RANK[name] > RANK[module]
    ]


def test_every_module_has_a_layer_and_imports_point_one_way() -> None:
    found: list[str] = []
    for path in sorted({*PACKAGE.rglob("*.py"), *CONVERT.rglob("*.py")}):
        inside = path.is_relative_to(CONVERT)
        parts = ("convert", path.name) if inside else path.relative_to(PACKAGE).parts
        # `python -m mlx_redrafter.convert` is the command line too.
        module = "__main__" if path.name == "__main__.py" else parts[0].removesuffix(".py")
        if module != "__init__":  # the lazy exports
            assert module in RANK, f"{path.name}: give {module} a row in LAYERS"
            package = ".".join((PACKAGE.name, *parts[:-1]))
            found += violations(module, path.read_text(), package)
    assert found == []


def test_the_layer_test_can_fail() -> None:
    assert violations("models", "from mlx_redrafter.decoding.step import x") == [
        "models imports decoding"
    ]
    assert violations("decoding", "def f():\n    from mlx_redrafter import cli") == [
        "decoding imports cli"
    ]
    assert violations("models", "from ..decoding import x", "mlx_redrafter.models") == [
        "models imports decoding"
    ]
    guarded = "if TYPE_CHECKING:\n    from mlx_redrafter.decoding import step"
    assert violations("models", guarded) == []


def test_every_package_folder_is_installed() -> None:
    """By name in pyproject.toml, because convert/ lies elsewhere."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = set(re.findall(r'"mlx_redrafter\.(\w+)",', text.partition("packages = [")[2]))
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"convert"}
    assert folders == listed


def test_import_is_quick_and_loads_no_mlx_torch_or_network() -> None:
    code = (
        "import json, sys, time\n"
        "start = time.process_time()\n"
        "import mlx_redrafter\n"
        "took = time.process_time() - start\n"
        "heavy = {'mlx', 'mlx_lm', 'torch', 'transformers', 'huggingface_hub', 'httpx'}\n"
        "print(json.dumps([took, mlx_redrafter.__version__, sorted(heavy & sys.modules.keys())]))\n"
    )
    runs = []
    for _ in range(3):  # processor time, the best of three: other work must not count
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(out.stdout))
    assert runs[0][1:] == [mlx_redrafter.__version__, []]
    assert min(took for took, _, _ in runs) < 0.1
