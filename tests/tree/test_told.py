"""The tree of a step in plain numbers, beside the step itself."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import asked, engine_of, run
from fake_grammar import Drawn

from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.tree.shape import BEAMS, TreeShape
from mlx_redrafter.tree.told import GRAMMAR

SHAPES = [
    TreeShape.plain(), TreeShape.chain(3), TreeShape(3, 4, 8), TreeShape(2, 3, 9, lookup=4),
    TreeShape(1, 0, 4, lookup=3), TreeShape(3, 3, 6, mode="beams"),
]  # fmt: skip


def trees_of(engine: Engine, prompt: list[int], shape: TreeShape, **more: Any) -> list[Any]:
    """(the step's tokens, its tree) of an answer."""
    request = asked(prompt, shape=shape, trees=True, **more)
    return [(step.tokens, step.tree) for step in engine.generate(request)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tree_tells_what_its_step_did(target: Any, texts: Any, oracle: Any, shape: Any) -> None:
    """Kept nodes and the bonus are the step's tokens, the root the one before; every checked node's
    choice is right where it was kept, and costs rise along a path. (Kept nodes found by their token
    alone, or choices that are read one place off, fail.)"""
    prompt, answer = texts[2]
    engine = engine_of(target, oracle, compiled=False)
    found = trees_of(engine, prompt, shape)
    assert [t for tokens, _ in found for t in tokens] == answer[:24]
    root, most = prompt[-1], 0
    for tokens, tree in found:
        kept = [node for node in tree.nodes if node.kept]
        path = [node.token for node in kept]
        assert path == [root, *tokens[:-1]] or len(path) > len(tokens)  # the last one is cut
        assert tree.nodes[0].token == root and tree.nodes[0].part == ""
        choices = [node.choice for node in kept]
        assert choices == [*path[1:], tree.bonus]
        assert all(node.checked for node in kept)
        assert sum(node.checked for node in tree.nodes) <= shape.nodes
        most = max(most, len(tree.nodes))
        for i, node in enumerate(tree.nodes):
            assert node.parent < i
            assert (node.choice is not None) == node.checked
            if i and None not in (node.cost, tree.nodes[node.parent].cost):
                assert node.cost >= tree.nodes[node.parent].cost
        root = tokens[-1]
    parts = {node.part for _, tree in found for node in tree.nodes[1:]}
    assert parts <= set(shape.parts)
    assert BEAMS not in shape.parts or BEAMS in parts
    if shape.width > 1:
        assert most > shape.nodes  # some were proposed and not checked


def test_trees_change_nothing_and_are_the_same_in_company(
    target: Any, texts: Any, oracle: Any
) -> None:
    engine, shape = engine_of(target, oracle, compiled=False), TreeShape(3, 3, 6, lookup=2)
    (first, _), (second, _) = texts[1], texts[3]
    alone = trees_of(engine, first, shape, max_tokens=12)
    params = SamplingParams(temp=0.9, seed=3)
    assert run(engine, second, params, shape, 9) == [
        t for tokens, _ in trees_of(engine, second, shape, params=params, max_tokens=9)
        for t in tokens
    ]  # fmt: skip
    batch, found = Batch(engine), []
    watched = batch.add(asked(first, shape=shape, max_tokens=12, trees=True))
    batch.add(asked(second, params, shape, 9))
    while batch.rows or batch.waiting:
        for row, emitted in batch.step():
            if row is watched:
                found.append((emitted.tokens, emitted.tree))
            else:
                assert emitted.tree is None
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    assert [tree.nodes for _, tree in found[:-1]] == [tree.nodes for _, tree in alone[:-1]]


def test_trees_of_an_answer_with_a_grammar(target: Any, texts: Any, oracle: Any) -> None:
    """The bonus is the token that was chosen again, and what is certain comes from the grammar."""
    engine, (prompt, _) = engine_of(target, oracle, compiled=False), texts[2]
    shape, grammar = TreeShape(3, 4, 8), Drawn(target.config.vocab_size, 4, share=0.9)
    plain = run(engine, prompt, shape=shape, grammar=grammar)
    found = trees_of(engine, prompt, shape, grammar=grammar)
    assert [t for tokens, _ in found for t in tokens] == plain
    for tokens, tree in found:
        kept = [node.token for node in tree.nodes if node.kept][1:]
        assert [*kept, tree.bonus] == tokens[: len(kept) + 1]
    assert GRAMMAR in {node.part for _, tree in found for node in tree.nodes}
    assert any(tree.nodes[0].choice != tokens[0] for tokens, tree in found)  # chosen again
