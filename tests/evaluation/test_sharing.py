"""What beams that begin alike save: from trees that are told, against Apple's candidate set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_medusa
from conftest import asked, engine_of, prompt_of, random_drafter, write_target
from tiny_chat import write_tokenizer
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.evaluation import acceptance, sharing
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.tree.shape import BEAMS, TreeShape
from mlx_redrafter.tree.told import ToldNode, ToldTree


def node(parent: int, part: str = BEAMS) -> ToldNode:
    return ToldNode(1, parent, 0.0, part, False, False, None)


def test_a_known_tree() -> None:
    """Three beams of two tokens over two beginnings; a third beginning that no beam goes on from
    costs nothing at depth 2. (All candidates counted, instead of those on beams, fail.)"""
    tree = ToldTree((node(-1, ""), *map(node, (0, 0, 0, 1, 1, 2))), 5)
    assert sharing.held(tree, 1) == (3, 3)
    assert sharing.held(tree, 2) == (5, 3)
    shared = sharing.Shared(0.0, 3, 2)
    shared.add(tree)
    shared.add(tree)
    assert (shared.tokens, shared.nodes) == (12, 10)
    assert shared.saved == pytest.approx(1 / 6) and sharing.Shared(0.0, 3, 2).saved == 0


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_a_deep_search_tells_of_every_depth(target: Decoder, temp: float) -> None:
    """Its levels give the nodes that Apple's candidate set of that depth has."""
    engine = engine_of(target, random_drafter(target, cell="gru"), compiled=False)

    def first(shape: TreeShape) -> ToldTree:
        request = asked(
            prompt_of(9), SamplingParams(temp=temp), shape=shape, max_tokens=1, trees=True
        )
        (step,) = engine.generate(request)
        assert step.tree is not None
        return step.tree

    deep = first(TreeShape(4, 4, 8))
    for depth in (2, 3, 4):
        apple = first(TreeShape(4, depth, 1 + 4 * depth, "beams"))
        assert sharing.held(deep, depth) == (len(apple.nodes) - 1, 4)
    assert sharing.held(deep, 4)[0] < 16


def test_the_command_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, place = write_target(tmp_path / "model"), tmp_path / "heads"
    write_tokenizer(model)
    tiny_medusa.loaded(place, tiny_medusa.medusa_1(tiny_medusa.heads()), load_model(model))
    monkeypatch.setattr(sharing, "WIDTHS", (2,))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "ba be"}))
    given = ["bench", "acceptance", "-m", str(model), "-d", str(place), "--sharing"]
    given += ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "4"]
    told = CliRunner().invoke(cli.app, [*given, "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout)["rows"]
    assert [(row["temp"], row["width"], row["depth"]) for row in rows] == [
        (temp, 2, depth) for temp in acceptance.TEMPERATURES for depth in (1, 2, 3, 4, 5)
    ]
    assert all(row["saved"] == 0 for row in rows if row["depth"] == 1)
    shown = CliRunner().invoke(cli.app, given)
    assert "Drafted tokens that need no node" in shown.stdout and "depth 5" in shown.stdout
    refused = CliRunner().invoke(cli.app, [*given, "--record"])
    assert refused.exit_code == 1 and "without --record" in refused.stderr
