"""Imports point one way, over folders and over files; importing the package costs nothing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import mlx_redrafter
import mlx_redrafter.convert

NAME = "mlx_redrafter"
PACKAGE = Path(mlx_redrafter.__file__).parent
# In an editable installation it lies outside the package.
CONVERT = Path(mlx_redrafter.convert.__file__).parent

# A folder (or a file at the top) knows those of the rows above its own, and no other of its row.
LAYERS = [
    {"errors", "stats"},
    {"runtime"},
    {"terminal"},
    {"tree", "cache", "kernels"},
    {"models"},
    {"drafters", "prefill"},
    {"text"},
    {"hub"},
    {"decoding"},
    {"budget"},
    {"arguments"},
    {"api"},
    {"evaluation", "distributed"},
    {"training", "convert"},
    {"bench", "server"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every file by its dotted name."""
    found = {}
    for path in sorted({*PACKAGE.rglob("*.py"), *CONVERT.rglob("*.py")}):
        inside = path.is_relative_to(CONVERT)
        parts = ("convert", path.name) if inside else path.relative_to(PACKAGE).parts
        dotted = [NAME, *parts[:-1], parts[-1].removesuffix(".py")]
        found[".".join(dotted).removesuffix(".__init__")] = path
    return found


def imported(source: str, module: str, package: bool, known: set[str]) -> set[str]:
    """Our own modules that a file imports, anywhere in it and for types only too."""
    base = module.split(".") if package else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            # What is no file is a name in one.
            inner = {f"{start}.{alias.name}" for alias in node.names}
            names |= {name if name in known else start for name in inner}
    return {name for name in names if name in known} - {module, NAME}


def graph() -> dict[str, set[str]]:
    """What every file imports. The package's own lazy names are no import."""
    files = modules()
    known = set(files)
    return {
        name: imported(path.read_text(), name, path.name == "__init__.py", known)
        for name, path in files.items()
        if name != NAME
    }


def folder(module: str) -> str:
    last = module.rpartition(".")[2]
    return last if last == "__main__" else module.split(".")[1]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of another folder that is not in a row above."""
    return [
        f"{one} imports {other}"
        for one, others in sorted(edges.items())
        for other in sorted(others)
        if folder(one) != folder(other) and RANK[folder(other)] >= RANK[folder(one)]
    ]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Files that import each other, directly or over others (Tarjan's components above one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def test_every_folder_has_a_row_and_imports_point_up_the_table() -> None:
    edges = graph()
    nowhere = {folder(name) for name in edges} - RANK.keys()
    assert not nowhere, f"give {nowhere} a row in LAYERS"
    assert upward(edges) == []


def test_no_circle_over_files() -> None:
    assert circles(graph()) == []


def test_the_layer_test_can_fail() -> None:
    edges = graph()
    edges[f"{NAME}.models.decoder"].add(f"{NAME}.decoding.step")
    assert upward(edges) == [f"{NAME}.models.decoder imports {NAME}.decoding.step"]
    assert any(f"{NAME}.models.decoder" in circle for circle in circles(edges))
    known = {f"{NAME}.models", f"{NAME}.decoding.step", f"{NAME}.cli", f"{NAME}.cli.main"}
    for source in (
        "from mlx_redrafter.decoding.step import x",
        "from mlx_redrafter.decoding import step",
        "from ..decoding import step",
        "def f():\n    import mlx_redrafter.decoding.step",
        "if TYPE_CHECKING:\n    from mlx_redrafter.decoding import step",
    ):
        found = imported(source, f"{NAME}.models.decoder", False, known)
        assert found == {f"{NAME}.decoding.step"}, source
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_few_files_lie_loose() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_every_package_folder_is_installed() -> None:
    """By name in pyproject.toml, because convert/ lies elsewhere."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    listed = set(re.findall(r'"mlx_redrafter\.([\w.]+)",', text.partition("packages = [")[2]))
    found = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*/__init__.py")}
    assert {".".join(path.parts) for path in found} | {"convert"} == listed


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
