"""A session over machines that have layers of different kinds: they forget the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_cases import module_of
from conftest import run
from delta_cases import DELTA_CASES
from mlx.utils import tree_flatten
from shared_in_threads import on_all
from tiny_models import save

from mlx_redrafter.api import all_drafters
from mlx_redrafter.cache.session import Session
from mlx_redrafter.distributed.lead import Sharing
from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.split import Planned, Split
from mlx_redrafter.models import load_model

PROMPT = [(7 * i + 3) % 90 for i in range(24)]


@pytest.mark.bits
def test_all_go_back_to_where_the_last_one_can(tmp_path: Path) -> None:
    """The last machine has attention only and could be cut anywhere; the first goes back to a
    snapshot. Seen to fail: each goes back as far as it must."""
    raw = {**DELTA_CASES["qwen3_next"], "num_hidden_layers": 4}
    save(tmp_path, raw, dict(tree_flatten(module_of(raw, lively=True).parameters())))

    def work(link: Link) -> list[list[int]]:
        target = load_model(tmp_path, plan=Planned(link, Split("pipeline", (3, 1))))
        engine, session = Sharing(target, all_drafters(None), compiled=False), Session()
        engine.link = link
        texts = []
        for prompt in (PROMPT, [*PROMPT[:15], 4, 5, 6], [*PROMPT[:15], 4, 5, 7]):
            texts.append(run(engine, prompt, max_tokens=3, session=session))
            texts.append(run(engine, prompt, max_tokens=3))
        return texts

    first, second = on_all(2, work)
    assert first == second
    assert first[0::2] == first[1::2]
