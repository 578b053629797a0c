"""With an EAGLE head the text is plain decoding's, whatever the head says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_eagle
from conftest import PENALTIES, ByteTokenizer, engine_of, plainly, prompt_of, run, write_target
from eagle_fitted import plain_head
from halves import half_slow
from prefill_cases import TRIANGLEMIX, XATTENTION
from tiny_eagle import DIALECTS, loaded
from tiny_heads import PARAMS, SHAPES

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.budget import costs
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder, load_model

PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("deep")
    return load_model(write_target(folder, num_hidden_layers=tiny_eagle.LAYERS))


@pytest.fixture(scope="module")
def answers(deep: Decoder) -> dict[str, list[int]]:
    return {name: plainly(deep, PROMPT, 16, params) for name, params in PARAMS.items()}


@pytest.mark.parametrize("name", half_slow(DIALECTS))
def test_every_dialect(
    deep: Decoder, tmp_path: Path, answers: dict[str, list[int]], name: str
) -> None:
    engine = engine_of(deep, loaded(tmp_path, DIALECTS[name], deep), compiled=False)
    for params, answer in answers.items():
        for shape in (SHAPES[0], SHAPES[1]):
            assert run(engine, PROMPT, PARAMS[params], shape, 16) == answer


def test_the_layers_of_another_convention(
    deep: Decoder, tmp_path: Path, answers: dict[str, list[int]]
) -> None:
    head = DIALECTS["specforge"]
    wrong = replace(head, config=head.config | {"feature_layers_are": "inputs"})
    drafter = loaded(tmp_path, wrong, deep)
    assert drafter.features == (0, 2, 3)
    for params, answer in answers.items():
        engine = engine_of(deep, drafter, compiled=False)
        assert run(engine, PROMPT, PARAMS[params], SHAPES[1], 16) == answer


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(target: Decoder, tmp_path: Path, shape: Any, params: Any) -> None:
    """One of them compiled; prompts of one token and two, for which nothing is read."""
    engine = engine_of(target, loaded(tmp_path, plain_head(), target), shape == SHAPES[3])
    for prompt in (prompt_of(1), prompt_of(2), prompt_of(20, seed=1)):
        assert run(engine, prompt, params, shape, 20) == plainly(target, prompt, 20, params)


@pytest.mark.parametrize("params", [*PARAMS.values(), PENALTIES], ids=[*PARAMS, "penalties"])
def test_a_session_goes_on(target: Decoder, tmp_path: Path, params: SamplingParams) -> None:
    """On, cut, and back."""
    engine = engine_of(target, loaded(tmp_path, plain_head(), target), compiled=False)
    session = Session()
    first = run(engine, PROMPT, params, SHAPES[1], 12, session=session)
    for prompt in (PROMPT + first, PROMPT + first[:4] + [1, 2], PROMPT + first[:-1], [5, 6, 7]):
        found = run(engine, prompt, params, SHAPES[3], 10, session=session)
        assert found == plainly(target, prompt, 10, params)


@pytest.mark.measured
def test_what_it_costs_is_measured(target: Decoder, tmp_path: Path) -> None:
    engine = engine_of(target, loaded(tmp_path, plain_head(), target), compiled=False)
    found = costs.measure(target, engine.drafters, engine.step_function, compiled=False)
    assert set(found.draft) == set(costs.WIDTHS)
    assert all(first > 0 for first, _ in found.draft.values())


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temp": 0.9, "seed": 4, "top_p": 0.95},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "temp": 0.7, "seed": 1},
    "trianglemix": {"sparse_prefill": TRIANGLEMIX},
    "xattention": {"sparse_prefill": XATTENTION, "temp": 0.8, "seed": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_automatic_policy(
    byte_target: Decoder, tmp_path: Path, tokenizer: ByteTokenizer, options: dict[str, Any]
) -> None:
    """What pays is chosen for every step; a session is cut and goes on in between."""
    head = plain_head()
    size = ByteTokenizer.vocab_size
    weights = {name: value for name, value in head.weights.items() if name != "lm_head.weight"}
    head = replace(head, config=head.config | {"vocab_size": size}, weights=weights)
    drafter = loaded(tmp_path, head, byte_target)
    model = Model.of("tiny", tmp_path, byte_target, drafter, compiled=False)
    prompt, sessions, shapes = prompt_of(300, seed=5, vocab=250), (Session(), Session()), set()
    for asked in (prompt, [*prompt[:250], *prompt_of(40, seed=6, vocab=250)]):
        texts = []
        for draft, session in zip((True, False), sessions, strict=True):
            answer = stream_generate(
                model, tokenizer, asked, 60, draft=draft, session=session, **options
            )  # type: ignore[arg-type]
            responses = list(answer)
            texts.append([response.token for response in responses])
            shapes |= set(responses[-1].stats.shapes) if draft else set()
            if sparse := responses[-1].stats.sparse_prefill:
                assert sparse.sparse_layers > 0
        assert texts[0] == texts[1] and len(texts[0]) > 10
    assert len(shapes) > 1
