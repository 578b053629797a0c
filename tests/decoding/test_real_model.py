"""The built-in model with its drafter: a short `make exactness`, and the bits of the BLAS."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_redrafter.api import load
from mlx_redrafter.bench import exactness
from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.evaluation.prompts import read_prompts

pytestmark = pytest.mark.model


@pytest.mark.bits
def test_drafted_is_plain_is_mlx_lm() -> None:
    model, tokenizer = load(dtype=mx.float32)
    assert model.drafter is not None, "the built-in model comes with a drafter"
    reference = exactness.load_reference(model.folder)
    report = exactness.Report()
    mixture = exactness.sampling_options()
    for prompt in read_prompts(count=2):
        exactness.check_greedy(model, reference, tokenizer, prompt, 24, report)
        for _ in range(2):
            exactness.check_sampled(model, tokenizer, prompt, next(mixture), 16, report)
    assert report.differences == []
    assert sum(report.compared.values()) == 2 * (6 + 2)
    assert min(report.tokens.values()) >= 16


def test_what_is_passed_on_fits_into_float16() -> None:
    """Metal's built-in model computes in float16, which ends at 65,504; 24,926 were met."""
    model, tokenizer = load(drafter=None)
    ids, target = read_prompts(count=1)[0].encode(tokenizer)[:100], model.target
    slots = mx.arange(128, dtype=mx.int32)
    places, run = slots[: len(ids)], Pass(new_caches(target.caches, 128, target.dtype), slots[:1])
    layers = range(target.config.num_layers)
    _, outputs = target(mx.array(ids), places, slots <= places[:, None], slots, run, layers)
    assert 1_000 < mx.max(mx.abs(mx.stack(outputs))).item() < 40_000


DIGEST = """
import hashlib
import numpy as np
import mlx_redrafter
import mlx.core as mx
from mlx_redrafter.runtime import blas
from mlx_redrafter.hub import resolve
from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.models import load_model

target = load_model(resolve("smollm2-135m"))
slots = mx.arange(128)
caches = new_caches(target.caches, 128, mx.float32)
digest = hashlib.sha256()
for start, count in [(0, 21), (21, 1), (22, 8), (30, 16)]:
    positions = mx.arange(start, start + count)
    run = Pass(caches, mx.array([start]))
    tokens, mask = (positions * 977 + 5) % 49152, slots[None] <= positions[:, None]
    hidden, _ = target(tokens, positions, mask, slots, run)
    logits, caches = target.logits(hidden), run.caches
    mx.eval(logits, caches)
    digest.update(np.array(logits).tobytes())
print(blas.status().name, digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has one BLAS only")
def test_the_fast_blas_gives_the_logits_of_the_reference() -> None:
    """Prompt, single step and tree-sized passes: the same bits, so the same text."""
    digests = {}
    for name in ("reference", "row-exact"):
        variables = {**os.environ, "MLX_REDRAFTER_BLAS": name}
        process = subprocess.run(
            [sys.executable, "-c", DIGEST], env=variables, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        used, digest = process.stdout.split()
        assert used == name
        digests[name] = digest
    assert digests["reference"] == digests["row-exact"]
