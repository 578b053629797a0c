"""A drafter from nothing, in a minute: a toy model writes its own text, a drafter learns it.

    python examples/train_tiny.py [FOLDER]

The toy is a random two-layer Llama whose next token mostly follows from the last one. The stages
are those of `mlx-redrafter train`; only the model and the numbers are small.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import mlx_redrafter

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mlx_redrafter.training import folder, stages
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.fit import Fit

WORDS = ["<s>", "</s>", *(a + b for a in "bdfgklmnprst" for b in "aeiou")]
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(WORDS),
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def write_toy(place: Path) -> Path:
    """A model folder: config, weights, tokenizer."""
    random = np.random.default_rng(1)
    arguments = llama.ModelArgs.from_dict(SHAPE)
    weights = {}
    for name, value in tree_flatten(llama.Model(arguments).parameters()):
        noise = random.standard_normal(value.shape) / value.shape[-1] ** 0.5
        weights[name] = np.ones(value.shape) if name.endswith("norm.weight") else noise
    # After a token comes its successor in a random order, unless the context says otherwise.
    embedding = random.standard_normal((len(WORDS), SHAPE["hidden_size"]))
    weights["model.embed_tokens.weight"] = embedding
    follower = np.concatenate([[0, 1], 2 + random.permutation(len(WORDS) - 2)])
    weights["lm_head.weight"] = embedding[np.argsort(follower)] * 0.06
    place.mkdir(parents=True, exist_ok=True)
    arrays = {name: mx.array(value.astype(np.float32)) for name, value in weights.items()}
    mx.save_safetensors(str(place / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (place / "config.json").write_text(json.dumps(SHAPE))
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="ba"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:2]])
    tokenizer.save(str(place / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(facts))
    return place


def tokens_per_step(model: Path, drafter: Path) -> float:
    """Over 8 greedy answers of 48 tokens that were not trained on, a chain of 4."""
    loaded, tokenizer = mlx_redrafter.load(str(model), str(drafter))
    total = mlx_redrafter.DraftStats()
    random = np.random.default_rng(99)
    for _ in range(8):
        prompt = random.integers(2, len(WORDS), 6).tolist()
        *_, last = mlx_redrafter.stream_generate(
            loaded, tokenizer, prompt, 48, tree=mlx_redrafter.TreeShape.chain(4)
        )
        total.add(last.stats)
    return total.tokens_per_step


def main(place: Path) -> tuple[float, float]:
    """Train; returns tokens per step of the untrained and of the trained drafter."""
    config = TrainConfig(
        model=str(write_toy(place / "model")), out=place / "run", answer_tokens=12_000,
        max_tokens=48, prompt_tokens=16, batch=64, draft_vocab_size=0, positions=60_000,
        batch_positions=256, segment=16, candidates=64, learning_rate=3e-3, bits=16,
    )  # fmt: skip
    run = stages.open_run(*folder.settle({k: v for k, v in vars(config).items() if v is not None}))
    stages.answers(run)  # prompts and answers
    untrained = Fit(run.target, run.config, run.config.out).export(place / "untrained")
    stages.fit(run)
    before = tokens_per_step(place / "model", untrained)
    after = tokens_per_step(place / "model", place / "run" / "drafter")
    print(f"tokens per step: untrained {before:.2f}, trained {after:.2f}")
    return before, after


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
