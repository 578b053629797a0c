"""What callers hand to the Python API: taken as mlx_lm takes it, or refused with the right call."""

from __future__ import annotations

import re
from collections import UserDict, deque
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ByteTokenizer, engine_of, run, write_target
from tiny_chat import write_chat_model

import mlx_redrafter
from mlx_redrafter import api
from mlx_redrafter.api import Model, generate, load, stream_generate
from mlx_redrafter.cache.packed import PackedSlab
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model, small_rows
from mlx_redrafter.tree.shape import TreeShape

IDS = [256, *b"once"]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(byte_target: Decoder) -> Model:
    return model_of(byte_target)


def model_of(target: Decoder) -> Model:
    return Model.of("tiny", Path("."), target, compiled=False)


def tokens(model: Any, prompt: Any = IDS, tokenizer: Any = None, **options: Any) -> list[int]:
    options = {"max_tokens": 6, **options}
    stream = stream_generate(model, tokenizer or ByteTokenizer(), prompt, **options)
    return [response.token for response in stream]


@pytest.fixture(scope="module")
def answer(byte_target: Decoder) -> list[int]:
    return run(engine_of(byte_target, None, compiled=False), IDS, max_tokens=6)


PROMPTS: dict[str, Any] = {
    "text": "once",
    "tuple": tuple(IDS),
    "deque": deque(IDS),
    "numpy": np.array(IDS),
    "numpy uint16": np.array(IDS, np.uint16),
    "mlx": mx.array(IDS),
    "list of numpy": list(np.array(IDS)),
    "list of mlx": [mx.array(token) for token in IDS],
    "iterator": iter(IDS),
    "what a template returns": UserDict(input_ids=IDS, attention_mask=[1] * 5),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompts(model: Model, answer: list[int], prompt: Any) -> None:
    assert tokens(model, prompt) == answer


NOTHING = [*SamplingParams.__dataclass_fields__, "stop", "stop_tokens", "tree", "session", "draft"]
NOTHING += ["prefill_step_size", "prompt_progress_callback", "sparse_prefill", "prediction"]
NOTHING += ["sampler", "logits_processors", "prompt_cache", "draft_model", "kv_bits", "max_kv_size"]


@pytest.mark.parametrize("name", NOTHING)
def test_none_is_not_given(model: Model, answer: list[int], name: str) -> None:
    assert tokens(model, **{name: None}) == answer


SAME: list[dict[str, Any]] = [
    {"stop": []},
    {"stop": "\0\0\0\0"},
    {"stop_tokens": []},
    {"stop_tokens": np.array([], np.int64)},
    {"logit_bias": {}},
    {"logit_bias": {"42": 0.0}},
    {"logit_bias": {np.int64(42): np.float32(0)}},
    {"seed": np.uint32(7)},
    {"temp": np.float32(0)},
    {"temp": mx.array(0.0)},
    {"top_k": 5.0},
    {"prefill_step_size": np.int32(2)},
    {"max_tokens": np.int64(6)},
    {"max_tokens": 6.0},
    {"draft": False},
]


@pytest.mark.parametrize("options", SAME, ids=str)
def test_other_types_of_the_same_value(
    model: Model, answer: list[int], options: dict[str, Any]
) -> None:
    assert tokens(model, **options) == answer


def test_no_seed_is_the_default_seed(model: Model) -> None:
    assert tokens(model, temp=1.0, seed=None) == tokens(model, temp=1.0, seed=0)
    assert tokens(model, temp=1.0, seed=None) != tokens(model, temp=1.0, seed=3)


def test_the_usual_and_the_unlimited_length(tmp_path: Path, model: Model) -> None:
    endless = {ByteTokenizer.EOS: float("-inf")}
    assert len(tokens(model, max_tokens=None, logit_bias=endless)) == 256
    limit = 40
    short = load_model(write_target(tmp_path, vocab_size=259, max_position_embeddings=limit))
    options: Any = {"max_tokens": -1, "logit_bias": endless}
    *_, last = stream_generate(model_of(short), ByteTokenizer(), IDS, **options)  # type: ignore[arg-type]
    assert (last.generation_tokens, last.finish_reason) == (limit - len(IDS), "length")


@pytest.mark.parametrize("given", [lambda t: t, lambda t: [t], lambda t: np.array([t])])
def test_stop_tokens(model: Model, answer: list[int], given: Any) -> None:
    assert tokens(model, stop_tokens=given(answer[2])) == answer[: answer.index(answer[2]) + 1]


@pytest.mark.parametrize("options", [{}, {"temp": 1.0}, {"temp": 1.5, "top_k": 40, "top_p": 0.9}])
def test_a_banned_token_is_never_chosen(model: Model, options: dict[str, Any]) -> None:
    """All but three tokens are; top-k and top-p keep none of the others either."""
    left = {65, 66, 67}
    ban: dict[Any, float] = {t: float("-inf") for t in range(259) if t not in left}
    for seed in range(3):
        found = tokens(model, logit_bias=ban, seed=seed, max_tokens=20, **options)
        assert set(found) <= left and len(found) == 20
    text = {str(token): value for token, value in ban.items()}
    assert tokens(model, logit_bias=text, seed=2, max_tokens=20, **options) == found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens 0 is not possible: use 1 or more, or -1 for no limit"),
    ({"max_tokens": -2}, "max_tokens -2 is not possible: use 1 or more, or -1 for no limit"),
    ({"max_tokens": 3.5}, "max_tokens 3.5 is not a whole number: use 1 or more"),
    ({"max_tokens": True}, "max_tokens True is not a whole number"),
    ({"max_tokens": "6"}, "max_tokens '6' is not a whole number"),
    ({"max_tokens": float("inf")}, "max_tokens inf is not a whole number"),
    ({"temp": "warm"}, "temp 'warm' is not a number: use 0 to 100"),
    ({"temp": True}, "temp True is not a number"),
    ({"temp": [0.5]}, "temp [0.5] is not a number"),
    ({"temp": 1e-5}, "temp 1e-05 is not possible: use 0 for greedy, or 0.001 to 100"),
    ({"top_k": 2.5}, "top_k 2.5 is not a whole number"),
    ({"seed": -1}, "seed -1 is not possible: use 0 to 4294967295"),
    ({"logit_bias": [42]}, "logit_bias [42] is not possible: use token ids and what to add"),
    ({"logit_bias": {"x": 1.0}}, "logit_bias token 'x' is not a whole number"),
    ({"logit_bias": {1.5: 1.0}}, "logit_bias token 1.5 is not a whole number"),
    ({"logit_bias": {42: "much"}}, "logit_bias of token 42: 'much' is not a number"),
    ({"logit_bias": {42: None}}, "logit_bias of token 42: None is not a number"),
    ({"logit_bias": {42: float("nan")}}, "logit_bias of token 42: nan is not possible"),
    ({"logit_bias": {42: float("inf")}}, "logit_bias of token 42: inf is not possible"),
    ({"logit_bias": {"42": 1.0, 42: 2.0}}, "logit_bias names token 42 twice"),
    ({"logit_bias": {259: 1.0}}, "logit_bias token 259 is not possible: use 0 to 258"),
    ({"logit_bias": dict.fromkeys(range(259), float("-inf"))}, "logit_bias bans every token"),
    ({"stop": 5}, "stop 5 is not possible: give text, or a list of texts; token ids go "),
    ({"stop": [b"x"]}, "stop [b'x'] is not possible"),
    ({"stop": b"x"}, "stop b'x' is not possible"),
    ({"stop": mx.array(5)}, "stop array(5, dtype=int32) is not possible"),
    ({"kv_bits": np.array([4, 8])}, "there is no option kv_bits: give it to load()"),
    ({"stop": ["a", None]}, "stop ['a', None] is not possible"),
    ({"stop_tokens": "x"}, "stop_tokens 'x' is not possible: give token ids; text goes into stop="),
    ({"stop_tokens": [259]}, "stop token 259 is not possible: use 0 to 258"),
    ({"stop_tokens": ["a"]}, "stop token 'a' is not a whole number"),
    ({"tree": 4}, "tree 4 is not possible: give a TreeShape"),
    ({"session": []}, "session [] is not possible: give a Session()"),
    ({"prediction": 3}, "prediction 3 is not possible: give text, or token ids in a list"),
    ({"prediction": [259]}, "prediction token 259 is not possible: use 0 to 258"),
    ({"prediction": ["a"]}, "prediction token 'a' is not a whole number"),
    ({"sparse_prefill": "xattention"}, "sparse_prefill 'xattention' is not possible: give a Sp"),
    ({"prompt_progress_callback": 5}, "prompt_progress_callback 5 is not possible: give a func"),
    ({"prefill_step_size": 0}, "prefill_step_size 0 is not possible: use 1 or more"),
    ({"prefill_step_size": "x"}, "prefill_step_size 'x' is not a whole number"),
    ({"sampler": len}, "there is no option sampler: give temp=, top_p=, min_p= and top_k="),
    ({"logits_processors": [len]}, "there is no option logits_processors: give logit_bias="),
    ({"prompt_cache": [1]}, "there is no option prompt_cache: give session=Session()"),
    ({"draft_model": 1}, "there is no option draft_model: give the drafter when loading: load(mo"),
    ({"num_draft_tokens": 3}, "there is no option num_draft_tokens: give tree=TreeShape.chain(3)"),
    ({"kv_bits": 4}, "there is no option kv_bits: give it to load()"),
    ({"max_kv_size": 512}, "there is no option max_kv_size: leave it out"),
    ({"temperature": 0.5}, "there is no option temperature: give temp="),
    ({"tempp": 0.5}, "there is no option tempp: did you mean temp=?"),
    ({"max_token": 5}, "there is no option max_token: did you mean max_tokens=?"),
    ({"colour": 5}, "there is no option colour: the docstring lists the options"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_at_the_call(model: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match="^" + re.escape(said)) as caught:
        stream_generate(model, ByteTokenizer(), IDS, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


MESSAGES_SAID = "the prompt is a list of messages: give tokenizer.apply_chat_template(messages,"
BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "the prompt is empty"),
    ([], "the prompt is empty"),
    (np.array([]), "the prompt is empty"),
    (None, "the prompt is of type NoneType: give text, or token ids in a list"),
    (b"once", "the prompt is of type bytes"),
    (5, "the prompt is of type int"),
    (Path("once"), "the prompt is of type PosixPath"),
    (MESSAGES, MESSAGES_SAID),
    (tuple(MESSAGES), MESSAGES_SAID),
    (MESSAGES[0], MESSAGES_SAID),
    ({"messages": MESSAGES}, MESSAGES_SAID),
    (["one", "two"], "the prompt is a list of texts"),
    (mx.array([[1, 2, 3]]), "the prompt has more than one dimension"),
    (np.array([[1], [2]]), "the prompt has more than one dimension"),
    ([[1, 2], [3]], "the prompt has more than one dimension"),
    ({"input_ids": [[1, 2]]}, "the prompt has more than one dimension"),
    ([1, 2.5], "prompt token 2.5 is not a whole number"),
    ([1, True], "prompt token True is not a whole number"),
    ([1, None], "prompt token None is not a whole number"),
    ([1, 259], "the prompt holds token 259, which is outside the model's vocabulary: use 0 to 258"),
    (mx.array([-1, 2]), "the prompt holds token -1, which is outside the model's vocabulary"),
    ([1] * 3000, "the prompt has 3000 tokens and the model's context 2048"),
]


@pytest.mark.parametrize(("prompt", "said"), BAD_PROMPTS, ids=lambda value: str(value)[:30])
def test_prompts_that_cannot_be_meant(model: Model, prompt: Any, said: str) -> None:
    with pytest.raises(OptionError, match="^" + re.escape(said)):
        stream_generate(model, ByteTokenizer(), prompt)  # type: ignore[arg-type]


def test_models_that_are_none(model: Model) -> None:
    tokenizer: Any = ByteTokenizer()
    swapped: Any = (tokenizer, model)
    for pair, said in (
        (swapped, "model and tokenizer are swapped: give model, tokenizer, prompt"),
        (
            (nn.Linear(2, 2), tokenizer),
            "this model was not loaded by mlx_redrafter: use model",
        ),
        ((model.target, tokenizer), "this model was not loaded by mlx_redrafter"),
        (("smollm2-135m", tokenizer), "'smollm2-135m' is not a loaded model: use model, tokenizer"),
        ((None, tokenizer), "None is not a loaded model"),
        ((model, None), "None is not a tokenizer: give the one that load() returned"),
        ((model, "smollm2-135m"), "'smollm2-135m' is not a tokenizer"),
        ((model, model), "Model("),
    ):
        with pytest.raises(OptionError, match="^" + re.escape(said)):
            generate(*pair, "once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


def test_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, mlx_lm's arguments that say nothing, and a bare tokenizer of transformers."""
    monkeypatch.setattr(api.parts, "_compiler_present", lambda: False)  # for a few tokens quicker
    model, tokenizer = load(str(folder), drafter=None)
    want = generate(model, tokenizer, "da da", max_tokens=6)
    for given, more in (
        (folder, {"drafter": None}),
        (folder, {"drafter": "auto", "lazy": False, "adapter_path": None}),
        (folder, {"tokenizer_config": {"trust_remote_code": False}}),
    ):
        assert generate(*load(given, **more), "da da", max_tokens=6) == want
    assert load(folder)[0].name == str(folder)
    bare: Any = tokenizer._tokenizer
    assert generate(model, bare, "da da", max_tokens=6) == want


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        (None, {}, "model None is not possible: give a folder or a hub id"),
        (5, {}, "model 5 is not possible"),
        (b"x", {}, "model b'x' is not possible"),
        (".", {"drafter": True}, "drafter True is not possible: give a folder or a hub id; None d"),
        (".", {"drafter": {"eos_token": "x"}}, "drafter {'eos_token': 'x'} is not possible: name "),
        (".", {"dtype": "float16"}, "dtype 'float16' is not possible: give mx.float16, "),
        (".", {"dtype": mx.int8}, "dtype mlx.core.int8 is not possible"),
        (".", {"revision": 5}, "revision 5 is not possible: give a branch, tag or commit as text"),
        (".", {"tokenizer_config": 5}, "tokenizer_config 5 is not possible: give a dictionary"),
        (".", {"tokenizer_config": {1: 2}}, "tokenizer_config {1: 2} is not possible: its keys"),
        (".", {"othr": 5}, "there is no option othr: the docstring lists the options"),
        (".", {"adapter_path": "x"}, "there is no option adapter_path: fuse the adapter first"),
        (".", {"lazy": True}, "there is no option lazy: leave it out"),
        (".", {"draftr": "x"}, "there is no option draftr: did you mean drafter=?"),
        (".", {"temp": 0.5}, "there is no option temp: give it to generate()"),
        (".", {"kv_bits": 5}, "kv_bits 5 is not possible: use 8 or 4"),
        (".", {"exact": "no"}, "exact 'no' is not possible: give True or False"),
        (".", {"kv_group_size": 16}, "kv_group_size 16 is not possible: use 32, 64 or 128"),
    ],
    ids=str,
)
def test_load_refuses(given: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match="^" + re.escape(said)):
        load(given, **more)


def test_load_for_quantised_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that divide into groups; a session belongs to the model that was loaded so."""
    monkeypatch.setattr(api.parts, "_compiler_present", lambda: False)
    given = write_chat_model(tmp_path, head_dim=32)
    with pytest.raises(OptionError, match="give a kv group size of 32"):
        load(given, None, kv_bits=8)
    pair, session = load(given, None, kv_bits=8, kv_group_size=32), Session()
    assert all(isinstance(kind, PackedSlab) for kind in pair[0].target.caches)
    text = generate(*pair, "da da", max_tokens=8, session=session)
    assert generate(*pair, "da da", max_tokens=8, draft=True) == text
    with pytest.raises(OptionError, match="the session belongs to another model"):
        generate(*load(given, None), "da da", session=session)
    assert pair[0].budget.conditions() != load(given, None)[0].budget.conditions()


@pytest.mark.parametrize(("exact", "choice"), [(True, "exact"), (False, None)])
def test_load_says_which_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, choice: str | None
) -> None:
    asked = []
    monkeypatch.setattr(small_rows, "switch_on", lambda model, say, by: asked.append((model, by)))
    monkeypatch.setattr(api.parts, "_compiler_present", lambda: False)
    loaded, _ = load(write_chat_model(tmp_path), None, exact=exact)
    assert asked == [(loaded.target, choice)]
    monkeypatch.setenv("MLX_REDRAFTER_KERNEL", "quick")
    with pytest.raises(OptionError, match="MLX_REDRAFTER_KERNEL=quick is not possible"):
        load("nowhere/at-all", exact=exact)


def test_verbose_is_a_switch(model: Model) -> None:
    with pytest.raises(OptionError, match="verbose 'no' is not possible: give True or False"):
        generate(model, ByteTokenizer(), IDS, verbose="no")  # type: ignore[arg-type]


def test_a_drafter_by_its_path(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mlx_redrafter.RedrafterError, match=re.escape(str(tmp_path))):
        load(folder, tmp_path)  # read as a folder, which holds none


def test_a_session_serves_one_answer_at_a_time(model: Model, answer: list[int]) -> None:
    session, tokenizer = Session(), ByteTokenizer()
    options: Any = {"max_tokens": 6, "session": session}
    first = stream_generate(model, tokenizer, IDS, **options)  # type: ignore[arg-type]
    second = stream_generate(model, tokenizer, IDS, **options)  # type: ignore[arg-type]
    begun = [next(first).token, next(first).token]
    with pytest.raises(OptionError, match="the session is in use by another answer"):
        next(second)
    with pytest.raises(OptionError, match="the session is in use by another answer"):
        stream_generate(model, tokenizer, IDS, **options)  # type: ignore[arg-type]
    assert begun + [response.token for response in first] == answer
    assert tokens(model, session=session) == answer


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_an_answer_that_is_left_frees_its_session(
    model: Model, answer: list[int], close: bool
) -> None:
    session = Session()
    stream = stream_generate(model, ByteTokenizer(), IDS, session=session)  # type: ignore[arg-type]
    assert [next(stream).token for _ in range(3)] == answer[:3]
    if close:
        stream.close()
    del stream
    held = [*IDS, *answer[:3]]
    assert session.tokens == held[: len(session.tokens)] and len(session.tokens) >= len(IDS)
    assert tokens(model, session=session) == answer


def test_a_session_of_another_model(tmp_path: Path, model: Model) -> None:
    other = model_of(load_model(write_target(tmp_path, seed=8, vocab_size=259)))
    session = Session()
    tokens(model, session=session)
    with pytest.raises(OptionError, match="the session belongs to another model"):
        stream_generate(other, ByteTokenizer(), IDS, session=session)  # type: ignore[arg-type]
    session.clear()
    assert tokens(other, session=session) == tokens(other)


@pytest.mark.parametrize(
    "shape", [{"width": "3"}, {"depth": 2.5}, {"nodes": True}, {"nodes": 0}, {"lookup": "x"}]
)
def test_shapes_of_the_wrong_type(shape: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"is not (possible|a whole number): use "):
        TreeShape(**shape)


def test_shapes_of_another_type_are_the_same() -> None:
    shape: Any = (np.int64(3), 4.0, np.int32(8))
    assert TreeShape(*shape) == TreeShape(3, 4, 8)
    assert str(TreeShape(*shape)) == "beam 3x4, 8 nodes"
