"""What an answer took, in the names of several servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_redrafter.server.events import Usage
from mlx_redrafter.stats import DraftStats


def usage(answers: Sequence[Usage], choices: int = 1) -> dict[str, Any]:
    """OpenAI's; a prompt with several ``choices`` is counted once."""
    prompts = answers[::choices]
    read, written = sum(u.prompt for u in prompts), sum(u.completion for u in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached for u in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(u.reasoning for u in answers),
            "accepted_prediction_tokens": sum(u.stats.predicted for u in answers),
            "rejected_prediction_tokens": sum(
                max(0, u.prediction - u.stats.foretold) for u in answers
            ),
        },
    }


def more(answers: Sequence[Usage]) -> dict[str, Any]:
    """llama.cpp's ``timings``, vLLM's ``metrics``, and what is ours."""
    stats = DraftStats()
    for each in answers:
        stats.add(each.stats)
    decoding = max(1e-9, sum(u.seconds for u in answers))
    written = sum(u.completion for u in answers)
    return {
        "timings": {
            "cache_n": sum(u.cached for u in answers),
            "prompt_n": stats.prefill_tokens,
            "prompt_ms": round(1000 * stats.prefill_seconds, 3),
            "predicted_n": written,
            "predicted_ms": round(1000 * decoding, 3),
            "predicted_per_second": round(written / decoding, 3),
            "draft_n": stats.drafted,
            "draft_n_accepted": stats.accepted,
        },
        "metrics": {"speculative_decoding": _drafting(stats)},
        "x_redrafter": {
            "seed": answers[0].seed if answers else 0,
            "sparse_prefill": stats.sparse_prefill.as_dict() if stats.sparse_prefill else None,
        },
    }


def _drafting(stats: DraftStats) -> dict[str, Any] | None:
    if not stats.drafted:
        return None
    deepest = max(stats.histogram, default=0)
    return {
        "mean_acceptance_length": round(stats.tokens_per_step, 4),
        "draft_acceptance_rate": round(stats.acceptance_rate, 4),
        "acceptance_histogram": [stats.histogram[n] for n in range(deepest + 1)],
        "num_spec_steps": stats.steps,
        "num_accepted_draft_tokens": stats.accepted,
        "num_draft_tokens": stats.drafted,
    }
