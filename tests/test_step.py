"""The compiled step: traces, synchronisations, copies and sorts are counted, not guessed."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_redrafter
from mlx_redrafter.counts import host, metal
from mlx_redrafter.counts.graph import graph
from mlx_redrafter.decoding import beam, step
from mlx_redrafter.decoding.engine import Engine, Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.step import Bucket, make_state, make_step
from mlx_redrafter.decoding.tree import TreeShape
from mlx_redrafter.doctor import TINY
from mlx_redrafter.drafters.redrafter import ReDrafter, ReDrafterConfig
from mlx_redrafter.models import Decoder, DecoderConfig, cache, decoder_config
from mlx_redrafter.stats import DraftStats

PROMPT = [3, 14, 15, 92, 65, 35, 8, 9, 79]
SHAPES = [TreeShape.plain(), TreeShape.chain(4), TreeShape(3, 4, 8), TreeShape(4, 5, 16, "beams")]
SAMPLED = SamplingParams(
    temp=0.9, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.2, seed=1, logit_bias={5: 1.0}
)


def run(engine: Engine, params: SamplingParams, shape: TreeShape, count: int, **kw: Any) -> list:
    return [t for e in engine.generate(PROMPT, params, shape, count, **kw) for t in e.tokens]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_trace_per_bucket(target: Decoder, drafter: ReDrafter, shape: TreeShape) -> None:
    engine = Engine(target, drafter)
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
    engine = Engine(target, drafter)
    run(engine, SamplingParams(), TreeShape(3, 4, 8), 200)  # 128 slots at first, then 256
    assert engine.traces == 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_synchronisation_per_step_and_the_next_step_goes_first(
    target: Decoder, drafter: ReDrafter, shape: TreeShape
) -> None:
    engine, stats = Engine(target, drafter), DraftStats()
    run(engine, SAMPLED, shape, 5)  # traced and compiled
    iterator = engine.generate(PROMPT, SAMPLED, shape, 40, stats=stats)
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


def fresh_state(target: Decoder, capacity: int, history: bool = False) -> step.State:
    state = make_state(
        mx.array([5], mx.int32),
        mx.zeros((1, 64)),
        mx.array([100], mx.int32),
        cache.new_cache(target.config, capacity, mx.float32),
        mx.zeros((capacity,), mx.int32) if history else None,
    )
    mx.eval(state)
    return state


def peak_of_a_step(target: Decoder, drafter: ReDrafter, shape: TreeShape, hold: bool) -> float:
    """Memory that three steps need beyond what is there, in slabs."""
    capacity = 65536
    bucket = Bucket(shape, frozenset(), ())
    function = mx.compile(make_step(target, drafter if shape.drafts else None, bucket, int))
    state = fresh_state(target, capacity)
    slab = state["kv"][0].nbytes
    for turn in range(4):
        if turn == 1:  # the first call compiles
            before = mx.get_active_memory()
            mx.reset_peak_memory()
        held = state["kv"] if hold else None
        emitted, state = function(state, {})
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
    engine = Engine(target, drafter.bind(target))
    session = Session(kv=cache.new_cache(target.config, 16384, mx.float32))
    mx.eval(target.parameters(), drafter.parameters(), session.kv)
    slab, shape = session.kv[0].nbytes, TreeShape(3, 4, 8)
    run(engine, SamplingParams(), shape, 4, session=session)  # compiles
    held = list(session.kv) if hold else []
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
    bucket = Bucket(shape, SAMPLED.features, SAMPLED.windows)
    function = make_step(target, drafter, bucket, int)
    arrays = SAMPLED.arrays(target.config.vocab_size)

    def flat(*values: mx.array) -> list[mx.array]:
        state = make_state(values[0], values[1], values[2], list(values[4:]), values[3])
        emitted, new = function(state, arrays)
        return [emitted, new["root"], new["seen"], *new["kv"]]

    state = fresh_state(target, 512, history=True)
    inputs = [state["root"], state["seen"], state["position"], state["history"], *state["kv"]]
    assert metal.widest_sort(graph(flat, *inputs)) <= beam.SORT_WIDTH
    assert graph(flat, *inputs).traced, "the step was traced"
    wide_sort = graph(lambda x: [mx.topk(x, 4)], mx.zeros((3, 8192)))
    assert metal.widest_sort(wide_sort) == 8192, "the check can fail"


def test_no_metal_only_call() -> None:
    """Metal-only entry points appear nowhere; asking whether Metal is there is allowed."""
    package = Path(mlx_redrafter.__file__).parent
    forbidden = {"metal_kernel", "start_capture", "stop_capture"}
    seen = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                seen.add(node.attr)
                assert node.attr not in forbidden, f"{file}: {node.attr}"
    assert "is_available" in seen
