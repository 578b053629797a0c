"""The target answers the prompts, in batches, and its hidden states are kept on the way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx

from mlx_redrafter.models.sequences import Request, Sequences, Told
from mlx_redrafter.training import waves
from mlx_redrafter.training.shards import Shard, batched, save_features, write_lines

TEMPERATURES = (0.0, 0.8, 0.6, 0.0, 1.0, 0.8, 0.6, 0.0, 1.0, 0.8)  # 30 % greedy
POOL = 8  # batches whose prompts are sorted by length together


def plan(prompts: Sequence[Sequence[int]], batch: int, seed: int) -> Iterator[list[Request]]:
    """Requests in batches of like prompt length; a prompt's temperature and seed never change."""
    for start in range(0, len(prompts), POOL * batch):
        pool = [
            Request(prompt, TEMPERATURES[i % len(TEMPERATURES)], seed + i)
            for i, prompt in enumerate(prompts[start : start + POOL * batch], start)
        ]
        pool.sort(key=lambda r: len(r.prompt))
        yield from (list(part) for part in batched(pool, batch))


def write_shard(
    target: Sequences,
    requests: Sequence[Request],
    shard: Shard,
    *,
    max_tokens: int,
    end_tokens: Collection[int],
    told: Told | None = None,
) -> int:
    """Answer a batch and write its shard; returns the number of answer tokens.

    When it is stopped, the answers that are complete are kept beside the shard's place.
    """
    place = shard.file.with_suffix(waves.SUFFIX)
    answers = waves.write(target, requests, max_tokens, end_tokens, place, told or Told())
    if target.layers:
        save_features(shard.features_file, [a.features for a in answers])
    write_lines(
        shard.file,
        (
            {"prompt": list(r.prompt), "answer": a.tokens, "temp": r.temp}
            for r, a in zip(requests, answers, strict=True)
        ),
    )
    waves.forget(place)
    mx.clear_cache()
    return sum(len(a.tokens) for a in answers)
