"""The compiled step: traces, synchronisations, copies and sorts are counted, not guessed."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import asked, engine_of

import mlx_redrafter
from mlx_redrafter.bench.counts import host, metal
from mlx_redrafter.bench.counts.graph import graph
from mlx_redrafter.cache.layer import new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cli.doctor import TINY
from mlx_redrafter.decoding import step
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.step import StepSpec, make_step
from mlx_redrafter.drafters import beam
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.models import Decoder, DecoderConfig, decoder_config
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

PROMPT = [3, 14, 15, 92, 65, 35, 8, 9, 79]
SHAPES = [TreeShape.plain(), TreeShape.chain(4), TreeShape(3, 4, 8), TreeShape(4, 5, 16, "beams")]
SAMPLED = SamplingParams(
    temp=0.9, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.2, seed=1, logit_bias={5: 1.0}
)


def run(engine: Engine, params: SamplingParams, shape: TreeShape, count: int, **kw: Any) -> list:
    return [t for e in engine.generate(asked(PROMPT, params, shape, count, **kw)) for t in e.tokens]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_trace_per_bucket(target: Decoder, drafter: ReDrafter, shape: TreeShape) -> None:
    engine = engine_of(target, drafter)
    run(engine, SamplingParams(), shape, 40)
    assert engine.traces == 1
    run(engine, SAMPLED, shape, 40)
    assert engine.traces == 2, "other features are another bucket"
    for seed in (2, 3):  # other values are not
        other = SamplingParams(
            temp=0.5 + seed / 10, top_p=0.8, top_k=9, min_p=0.2, repetition_penalty=1.1, seed=seed,
            logit_bias={7: -1.0, 9: 2.0},
        )  # fmt: skip
        run(engine, other, shape, 30)
    run(engine, SamplingParams(), shape, 40, session=Session())
    assert engine.traces == 2


def test_a_larger_cache_is_one_more_trace(target: Decoder, drafter: ReDrafter) -> None:
    engine = engine_of(target, drafter)
    run(engine, SamplingParams(), TreeShape(3, 4, 8), 200)  # 128 slots at first, then 256
    assert engine.traces == 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_synchronisation_per_step_and_the_next_step_goes_first(
    target: Decoder, drafter: ReDrafter, shape: TreeShape
) -> None:
    engine, stats = engine_of(target, drafter), DraftStats()
    run(engine, SAMPLED, shape, 5)  # traced and compiled
    iterator = engine.generate(asked(PROMPT, SAMPLED, shape, 40, stats=stats))
    with host.watched() as log:
        first = next(iterator)
        at = log.index("async_eval")  # before that: the prefill
        assert log[at:] == ["async_eval", "async_eval", "tolist"]
        del log[:]
        produced = len(first.tokens) + sum(len(emitted.tokens) for emitted in iterator)
    assert produced == 40
    assert log.count("tolist") == stats.steps - 1
    assert set(log) == {"async_eval", "tolist"}
    for before, after in itertools.pairwise(log):
        assert (before, after) != ("async_eval", "async_eval"), "only one step ahead"
    # Every read but the last has a step launched before it.
    reads = [i for i, name in enumerate(log) if name == "tolist"]
    assert sum(log[i - 1] == "async_eval" for i in reads[:-1]) == len(reads) - 1


@pytest.fixture(scope="module")
def wide() -> tuple[Decoder, ReDrafter]:
    """One layer whose slab is much larger than everything else, and a real vocabulary."""
    config: DecoderConfig = decoder_config(
        {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 64, "vocab_size": 8192, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 65536, "rope_theta": 10000.0, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    target = Decoder(config)
    drafter = ReDrafter(ReDrafterConfig(64, 8192, 64))
    mx.eval(target.parameters(), drafter.parameters())
    return target, drafter.bind(target)


def fresh_state(
    target: Decoder, capacity: int, history: bool = False, drafts: bool = True
) -> step.State:
    state = step.State(
        mx.array([5], mx.int32),
        mx.array([100], mx.int32),
        new_caches(target.caches, capacity, mx.float32),
        (mx.zeros((1, 64)),) if drafts else (),
        mx.zeros((capacity,), mx.int32) if history else (),
    )
    mx.eval(state)
    return state


def peak_of_a_step(target: Decoder, drafter: ReDrafter, shape: TreeShape, hold: bool) -> float:
    """Memory that three steps need beyond what is there, in slabs."""
    capacity = 65536
    spec = StepSpec(shape, frozenset(), ())
    function = mx.compile(make_step(target, [drafter] if shape.drafts else [], spec, int))
    state = fresh_state(target, capacity, drafts=shape.drafts)
    slab = state.caches[0].nbytes
    for turn in range(4):
        if turn == 1:  # the first call compiles
            before = mx.get_active_memory()
            mx.reset_peak_memory()
        held = state.caches if hold else None
        emitted, after = function(state, {})
        state = step.State(*after)
        del after
        mx.eval(emitted, state)
        del held
    return (mx.get_peak_memory() - before) / slab


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_copy_of_a_slab(wide: tuple[Decoder, ReDrafter], shape: TreeShape) -> None:
    small = peak_of_a_step(*wide, shape, hold=False)
    assert small < 0.9  # attention's scores of 16 nodes are an eighth of a slab, several times
    assert peak_of_a_step(*wide, shape, hold=True) > small + 0.9, "a second reference does copy"


@pytest.mark.parametrize("hold", [False, True])
def test_a_running_answer_copies_no_slab(hold: bool) -> None:
    """With a step in flight ahead; of 16 layers, so that few are still read when it starts."""
    target = Decoder(decoder_config({**TINY, "num_hidden_layers": 16}))
    drafter = ReDrafter(ReDrafterConfig(target.config.hidden_size, target.config.vocab_size, 64))
    engine = engine_of(target, drafter.bind(target))
    session = Session().open(target.caches, 16384, mx.float32)
    mx.eval(target.parameters(), drafter.parameters(), session.caches)
    slab, shape = session.caches[0].nbytes, TreeShape(3, 4, 8)
    run(engine, SamplingParams(), shape, 4, session=session)  # compiles
    held = list(session.caches) if hold else []
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(engine, SamplingParams(), shape, 24, session=session)
    extra = (mx.get_peak_memory() - before) / slab
    del held
    assert (extra > 15) == hold, extra
    assert hold or extra < 4, extra


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_vocabulary_wide_sort(wide: tuple[Decoder, ReDrafter], shape: TreeShape) -> None:
    target, drafter = wide
    spec = StepSpec(shape, SAMPLED.features, SAMPLED.windows)
    function = make_step(target, [drafter], spec, int)
    arrays = SAMPLED.arrays(target.config.vocab_size)

    def flat(*values: mx.array) -> list[mx.array]:
        root, position, seen, history, *caches = values
        emitted, new = function(step.State(root, position, caches, (seen,), history), arrays)
        return [emitted, new.root, *new.drafts, *new.caches]

    state = fresh_state(target, 512, history=True)
    inputs = [state.root, state.position, *state.drafts, state.history, *state.caches]
    assert metal.widest_sort(graph(flat, *inputs)) <= beam.SORT_WIDTH
    assert graph(flat, *inputs).traced, "the step was traced"
    wide_sort = graph(lambda x: [mx.topk(x, 4)], mx.zeros((3, 8192)))
    assert metal.widest_sort(wide_sort) == 8192, "the check can fail"


def test_no_metal_only_call() -> None:
    """Metal-only entry points appear in the one file that has kernels; asking whether Metal is
    there is allowed."""
    package = Path(mlx_redrafter.__file__).parent
    forbidden = {"metal_kernel", "start_capture", "stop_capture"}
    seen = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                seen.add(node.attr)
                ours = file == package / "kernels" / "source.py" and node.attr == "metal_kernel"
                assert node.attr not in forbidden or ours, f"{file}: {node.attr}"
    assert "is_available" in seen
