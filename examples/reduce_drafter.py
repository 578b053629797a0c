"""Make a small drafter out of a large one: fewer output tokens, quantised weights.

A drafter in Apple's format reads its whole output matrix at every draft step. Most answers use few
of those rows. This keeps the rows of the tokens that are most frequent in a sample of answers and
quantises what is left; drafts can only name kept tokens, the text stays the target's.

    python examples/reduce_drafter.py DRAFTER OUT --answers answers.jsonl.gz [--vocab 8192]

``answers``: one JSON object per line with a list of token ids under "answer".
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_redrafter import load
from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig


def frequent_tokens(answers: Path, count: int) -> list[int]:
    """The ``count`` most frequent token ids, in rising order."""
    with gzip.open(answers, "rt") if answers.suffix == ".gz" else answers.open() as lines:
        seen: Counter[int] = Counter()
        for line in lines:
            seen.update(json.loads(line)["answer"])
    kept = sorted(token for token, _ in seen.most_common(count))
    share = sum(seen[t] for t in kept) / seen.total()
    print(f"{len(kept)} tokens cover {share:.1%} of {seen.total()} answer tokens")
    return kept


def reduced(drafter: ReDrafter, tokens: list[int]) -> ReDrafter:
    """The same drafter with only these tokens in its own output matrix."""
    config = ReDrafterConfig(**{**vars(drafter.config), "draft_vocab_size": len(tokens)})
    small = ReDrafter(config)
    rows = mx.array(tokens, mx.int32)
    weights = dict(tree_flatten(drafter.parameters()))
    last = f"lm_head.{config.num_draft_layers}.weight"
    weights[last] = weights[last][rows]
    weights["draft_vocab"] = rows
    small.load_weights(list(weights.items()))
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drafter")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()
    model, _ = load(args.model, args.drafter)
    small = reduced(model.drafter, frequent_tokens(args.answers, args.vocab))
    small.set_dtype(mx.float16)
    nn.quantize(small, args.group_size, args.bits)
    quantization = {"group_size": args.group_size, "bits": args.bits}
    save_drafter(args.out, small, {"quantization": quantization, "target_model": args.model})
    size = (args.out / "model.safetensors").stat().st_size
    print(f"wrote {args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
