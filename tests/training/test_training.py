"""The core of training: batched answers, features, batches of positions, losses, the fit itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import V, plainly, prompt_of, write_target
from mlx.utils import tree_flatten
from over_text import logits
from tiny_models import Runner

from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.drafters.rollout import final_hidden, head_inputs
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.batched import BatchedTarget
from mlx_redrafter.models.sequences import Request
from mlx_redrafter.training import answers
from mlx_redrafter.training.config import TrainConfig, from_mapping
from mlx_redrafter.training.data import Positions, compute_features
from mlx_redrafter.training.fit import Fit, fit
from mlx_redrafter.training.shards import Shard, record_layers, shards

LAYERS = (0, 1, 2)
SMALL = TrainConfig(
    positions=600, batch_positions=32, segment=8, rollout=3, candidates=32, draft_vocab_size=48,
    learning_rate=1e-2, num_draft_layers=1, bits=16,
)  # fmt: skip


def requests(count: int, temp: float = 0.0) -> list[Request]:
    return [Request(prompt_of(3 + 5 * i, seed=i), temp, seed=i) for i in range(count)]


def write_answers(target: Decoder, folder: Path, parts: int = 2) -> Path:
    batched = BatchedTarget(target, LAYERS)
    record_layers(folder, LAYERS)
    for part in range(parts):
        shard = Shard(folder / f"answers/{part:05d}.jsonl", folder / f"features/{part:05d}.npy")
        wanted = [
            Request(prompt_of(4 + i, seed=10 * part + i), 0.0 if i % 2 else 1.0, 100 * part + i)
            for i in range(6)
        ]
        answers.write_shard(batched, wanted, shard, max_tokens=24, end_tokens={5})
    return folder


@pytest.fixture(scope="module")
def folder(target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answers(target, tmp_path_factory.mktemp("training"))


def copied(folder: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(folder, to)
    return to


# Answers in batches


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"num_key_value_heads": 4}])
def test_greedy_answers_are_those_of_decoding(tmp_path: Path, changes: dict[str, Any]) -> None:
    target = load_model(write_target(tmp_path / "target", **changes))
    written = BatchedTarget(target, LAYERS).write(requests(5), 20, {5})
    for request, answer in zip(requests(5), written, strict=True):
        expected = plainly(target, list(request.prompt), 20)
        if 5 in expected:
            expected = expected[: expected.index(5) + 1]
        assert answer.tokens == expected


def test_sliding_windows_are_kept_in_a_batch(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "t", model_type="mistral", sliding_window=6)
    target = load_model(folder)
    written = BatchedTarget(target, ()).write(requests(4), 20, set())
    for request, answer in zip(requests(4), written, strict=True):
        assert answer.tokens == plainly(target, list(request.prompt), 20)


def test_an_answer_does_not_depend_on_its_batch(target: Decoder) -> None:
    batched, wanted = BatchedTarget(target, LAYERS), requests(6, temp=0.8)
    together = batched.write(wanted, 24, {5})
    alone = [batched.write([request], 24, {5})[0] for request in wanted]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert len({tuple(a.tokens) for a in together}) > 1


def test_reading_gives_the_features_of_writing(target: Decoder) -> None:
    batched, wanted = BatchedTarget(target, LAYERS), requests(5)
    written = batched.write(wanted, 24, {5})
    read = batched.read([(r.prompt, a.tokens) for r, a in zip(wanted, written, strict=True)])
    for answer, features in zip(written, read, strict=True):
        assert features.shape == (len(answer.tokens), 3, target.config.hidden_size)
        np.testing.assert_allclose(answer.features, features, atol=5e-3)


def test_features_predict_the_tokens(target: Decoder) -> None:
    for answer in BatchedTarget(target, (2,)).write(requests(4), 20, {5}):
        hidden = final_hidden(target, mx.array(answer.features))
        assert mx.argmax(target.logits(hidden), axis=-1).tolist() == answer.tokens


def test_sampled_frequencies_follow_the_distribution(target: Decoder) -> None:
    batched, prompt = BatchedTarget(target, ()), prompt_of(5)
    drawn = batched.write([Request(prompt, 1.0, seed) for seed in range(4000)], 1, set())
    counts = np.bincount([a.tokens[0] for a in drawn], minlength=V) / 4000
    features = BatchedTarget(target, (2,)).write([Request(prompt, 0.0, 0)], 1, set())[0].features
    p = np.array(mx.softmax(target.logits(final_hidden(target, mx.array(features))), axis=-1))[0]
    assert np.abs(counts - p).sum() < 0.15
    assert np.abs(counts - np.roll(p, 1)).sum() > 0.3  # the test can fail


def test_decoding_is_untouched_by_training(target: Decoder) -> None:
    prompt = mx.array([3, 1, 4, 1, 5])
    before = Runner(target)(prompt)
    BatchedTarget(target, ()).write(requests(2), 3, set())
    assert np.array_equal(before, Runner(target)(prompt))


# Batches of positions


def batches_of(folder: Path, target: Decoder, **options: Any) -> Positions:
    options = {"segment": 8, "rollout": 3, "cache_bytes": 1e9, "positions": 1, **options}
    return Positions(folder, BatchedTarget(target, (2,)), **options)


def agreement_with_the_target(folder: Path, target: Decoder, shift: int = 0) -> float:
    """Share of valid (greedy) positions whose token the target's distribution there calls best."""
    data = batches_of(folder, target)
    right = total = 0.0
    batch = next(data.batches(16, 0, 0))
    hidden = final_hidden(target, mx.array(batch.features))
    best = np.array(mx.argmax(target.logits(hidden.reshape(-1, hidden.shape[-1])), axis=-1))
    best = best.reshape(batch.tokens.shape)
    for k in range(1, 4):
        same = best[:, k : k + 8] == batch.tokens[:, k + shift : k + shift + 8][:, :8]
        right += (same * batch.valid[k - 1]).sum()
        total += batch.valid[k - 1].sum()
    return right / total


def test_targets_belong_to_their_tokens(target: Decoder, tmp_path: Path) -> None:
    greedy = tmp_path / "greedy"
    record_layers(greedy, LAYERS)
    shard = Shard(greedy / "answers/00000.jsonl", greedy / "features/00000.npy")
    answers.write_shard(
        BatchedTarget(target, LAYERS), requests(8), shard, max_tokens=24, end_tokens={5}
    )
    assert agreement_with_the_target(greedy, target) == 1.0
    assert agreement_with_the_target(greedy, target, shift=-1) < 0.5  # shifted by one position


def test_positions_do_not_cross_answers_and_all_are_seen(folder: Path, target: Decoder) -> None:
    data = batches_of(folder, target, segment=4)
    owner = {id(r): r.owner for r in data.rows}
    assert all(len(o) == len(r.tokens) for r, o in zip(data.rows, owner.values(), strict=True))
    seen = 0
    stream, epoch = data.batches(4, 0, 0), sum(-(-(r.cut + 3) // 4) for r in data.rows)
    for _ in range(-(-epoch // 4)):
        batch = next(stream)
        assert (batch.valid[1] <= batch.valid[0]).all()
        seen += int(batch.valid[0].sum())
    conversations = sum(len(np.unique(r.owner[: r.cut])) for r in data.rows)
    assert seen >= data.count - conversations - 16  # all but the last token of every answer


def test_held_out_answers_are_not_trained_on(folder: Path, target: Decoder) -> None:
    data = batches_of(folder, target)
    assert all(0 < r.cut < len(r.tokens) for r in data.rows)
    assert data.count + sum(len(r.tokens) - r.cut for r in data.rows) == sum(
        len(r.tokens) for r in data.rows
    )
    assert data.held_out(4, 2)[0].valid.sum() > 0


def test_missing_features_are_computed(folder: Path, target: Decoder, tmp_path: Path) -> None:
    own = copied(folder, tmp_path / "own")
    shard = shards(own)[0]
    before = np.load(shard.features_file)
    shard.features_file.unlink()
    compute_features(BatchedTarget(target, LAYERS), LAYERS, shard)
    np.testing.assert_allclose(np.load(shard.features_file), before, atol=5e-3)


# The fit


def run_fit(target: Decoder, folder: Path, config: TrainConfig) -> dict[str, mx.array]:
    rows: list[dict[str, Any]] = []
    result = fit(target, config, folder, rows.append)
    return dict(mx.load(str(result / "model.safetensors")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cell": "elman", "initial_state": "zero", "context_layers": "", "draft_vocab_size": 0},
        {"cell": "sum", "initial_state": "zero", "context_layers": "", "exit_dim": 64},
        {"head": "target", "exit_dim": 16},
        {"bits": 8, "exit_dim": 64},
    ],
    ids=["ours", "apple", "sum", "target-head", "quantised"],
)
def test_every_shape_learns_and_loads(
    folder: Path, target: Decoder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    own = copied(folder, tmp_path / "own")
    run = Fit(target, replace(SMALL, **changes), own)
    batches = [next(run.data.batches(16, 1, 0))]
    untrained = run.score(batches)
    run.run(lambda _: None)
    assert run.score(batches)["loss"] < untrained["loss"] - 0.05
    assert run.score(batches)["acceptance"][0] > untrained["acceptance"][0]
    log = [json.loads(line) for line in (own / "fit/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == log[-1]["steps"] == 19
    run.export(own / "drafter")
    loaded = load_drafter(own / "drafter", target)
    assert loaded.config.cell == changes.get("cell", "gru")


def test_the_written_drafter_computes_what_was_trained(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    """The scales are folded into the weights without a change of the logits."""
    changes = {"cell": "elman", "initial_state": "zero", "context_layers": ""}
    run = Fit(target, replace(SMALL, **changes), copied(folder, tmp_path / "own"))
    run.run(lambda _: None)
    loaded = load_drafter(run.export(tmp_path / "drafter"), target)
    features = mx.array(np.load(run.data.rows[0].shard.features_file)[:6])
    hidden = final_hidden(target, features)
    tokens = mx.array(run.data.rows[0].tokens[:6])[:, None]
    expected = logits(loaded, hidden, tokens)[0]
    for i in range(6):
        state, fixed = loaded.start(hidden[i])
        live, _ = loaded.step(tokens[i], state, fixed)
        np.testing.assert_allclose(live, expected[i : i + 1], atol=2e-3)
    trained = run.drafter
    embeddings = target.embed(tokens) / run.trainee.scales.embedding
    inside = head_inputs(trained, (hidden / run.trainee.scales.context)[:, None], embeddings, 1)[0]
    np.testing.assert_allclose(inside @ trained.output_rows().T, expected, atol=0.05)


class Stop(Exception):
    pass


@pytest.mark.bits
def test_interrupted_at_three_points_the_weights_are_the_same(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    whole = run_fit(target, copied(folder, tmp_path / "whole"), SMALL)
    own = copied(folder, tmp_path / "parts")
    for point in (3, 9, 16):

        def stop(row: dict[str, Any], point: int = point) -> None:
            if row["step"] == point:
                raise Stop

        with pytest.raises(Stop):
            fit(target, SMALL, own, stop)
    parts = run_fit(target, own, SMALL)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert mx.array_equal(value, parts[name]).item(), name


def test_more_answers_later_change_neither_vocabulary_nor_scales(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    write_answers(target, own, parts=1)
    config = replace(SMALL, draft_vocab_size=12)
    run_fit(target, own, config)
    before = Fit(target, config, own)
    batches = [next(before.data.batches(16, 1, 0))]
    for kind in ("answers", "features"):
        for file in (folder / kind).glob("00001.*"):
            # The first in order, and other tokens are frequent in it.
            (own / kind / f"0-{file.name}").write_bytes(file.read_bytes())
    after = Fit(target, config, own)
    assert len(after.data.rows) == 2
    assert after.support.tolist() == before.support.tolist()
    assert after.trainee.scales == before.trainee.scales
    assert after.score(batches) == before.score(batches)


def test_a_warm_start_goes_on_where_the_drafter_was(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    run_fit(target, own := copied(folder, tmp_path / "own"), SMALL)
    warm = replace(SMALL, warm_start=own / "drafter")
    again = Fit(target, warm, copied(folder, tmp_path / "again"))
    fresh = Fit(target, SMALL, copied(folder, tmp_path / "fresh"))
    batches = [next(again.data.batches(16, 1, 0))]
    assert again.score(batches)["loss"] < fresh.score(batches)["loss"] - 0.1
    with pytest.raises(OptionError, match="same shape"):
        Fit(target, replace(warm, num_draft_layers=2), copied(folder, tmp_path / "other"))


def test_optimiser_state_and_step_are_in_the_checkpoint(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    own = copied(folder, tmp_path / "own")
    run_fit(target, own, SMALL)
    again = Fit(target, SMALL, own)
    assert again.step == 19
    moments = [v for k, v in tree_flatten(again.optimizer.state) if k.endswith(".m")]
    assert moments and all(mx.any(m != 0).item() for m in moments[:3])


def test_no_answers_is_one_clear_error(target: Decoder, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="train answers"):
        Fit(target, SMALL, tmp_path)


def test_unknown_and_impossible_options() -> None:
    with pytest.raises(OptionError, match="unknown option 'positons'"):
        from_mapping({"positons": 3}, "a.yaml")
    with pytest.raises(OptionError, match="rollout 0"):
        from_mapping({"rollout": 0}, "a.yaml").check()
