"""Small models that only mlx_lm has draft, and are drafted for by others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, module_of, write_module
from conftest import engine_of, prompt_of, run, write_target

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import model as small
from mlx_redrafter.drafters.loading import check_folder, kind_of, load_drafter
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import AdaptedModel, load_model
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

CHAIN, TREE = TreeShape.chain(4), TreeShape(3, 4, 8)
PARAMS = (None, SamplingParams(temp=0.9, seed=4))
PROMPT, N = prompt_of(14), 15


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def adapted(kind: str) -> AdaptedModel:
    raw = TYPES[kind]
    return AdaptedModel(module_of(raw, lively=True), raw)


# Experts; latents; positions that the module counts itself; a window.
@pytest.mark.parametrize(
    "kind", ["dots1", "deepseek_v2", "gpt2", pytest.param("gemma3_text", marks=pytest.mark.slow)]
)
def test_the_model_itself_is_always_right(kind: str) -> None:
    target = adapted(kind)
    drafter = DraftModel(target, target.config.vocab_size)  # type: ignore[arg-type]
    engine = engine_of(target, drafter, compiled=False)
    plain = engine_of(target, None, compiled=False)
    for params in PARAMS:
        answer = run(plain, PROMPT, params, None, N)
        for shape in (CHAIN, TREE):
            session, stats = Session(), DraftStats()
            assert run(engine, PROMPT, params, shape, N, session, stats) == answer
            assert stats.tokens_per_step > (4.9 if shape is CHAIN else 2.4)
            again = [*PROMPT, *answer[:9], 3, 5]
            assert run(engine, again, params, shape, 9, session) == run(
                plain, again, params, None, 9
            )


def test_rows_of_branches_that_are_forgotten_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: small._Beside, layer: int, kind: object, rows: mx.array) -> mx.array:
        self._branches[layer] = mx.concatenate(
            [*([self._branches[layer]] if layer in self._branches else []), rows], axis=2
        )
        return mx.concatenate([self._slabs[layer], 0 * self._branches[layer]], axis=2)

    monkeypatch.setattr(small._Beside, "extend", alone)
    with pytest.raises(AssertionError):
        test_the_model_itself_is_always_right("dots1")


@pytest.mark.parametrize(("large", "little"), [("lfm2", None), (None, "dots1")])
def test_one_drafts_for_the_other(tmp_path: Path, large: str | None, little: str | None) -> None:
    """Through their folders: a native one for a hybrid, and one of mlx_lm's for a native one."""
    for folder, kind in ((tmp_path / "large", large), (tmp_path / "little", little)):
        if kind is None:
            write_target(folder, vocab_size=120)
        else:
            write_module(folder, kind)
    target = load_model(tmp_path / "large")
    check_folder(tmp_path / "little", target)
    drafter = load_drafter(tmp_path / "little", target)
    assert isinstance(drafter, DraftModel)
    facts = kind_of(tmp_path / "little").describe(tmp_path / "little")
    assert facts.one_level and facts.facts["draft_vocabulary"] == 120
    engine = engine_of(target, drafter, compiled=False)
    plain = engine_of(target, None, compiled=False)
    for params in PARAMS:
        assert run(engine, PROMPT, params, TREE, N) == run(plain, PROMPT, params, None, N)


def test_recurrences_do_not_draft(tmp_path: Path) -> None:
    write_module(tmp_path / "little", "lfm2")
    target = load_model(write_target(tmp_path / "large", vocab_size=120))
    for attempt in (load_drafter, check_folder):
        with pytest.raises(DrafterError, match=r"short convolutions.* cannot draft") as caught:
            attempt(tmp_path / "little", target)
        assert "\n" not in str(caught.value)
