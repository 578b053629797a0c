"""What doctor tests of one model: its passes, its drafter, its text, its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

from mlx_redrafter.runtime import blas
from mlx_redrafter.runtime.device import dtype_name

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_redrafter.api import Model
    from mlx_redrafter.models import Decoder

SIZES = range(2, 17)
# A pass over N rows may round otherwise than one row; beyond this share of the logits' size it is
# not rounding.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
PROMPT = "The three states of matter are solid, liquid and"
CAPACITY = 4096  # tokens in the cache, of which copies are looked for
ANSWER = 32  # tokens


@dataclass(frozen=True)
class Check:
    """One thing looked at. `facts` are plain values for --json."""

    name: str
    mark: Literal["ok", "warn", "fail"]
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A pass over N tokens against N single steps."""

    nodes: int
    largest: float  # max |logit difference|
    scale: float  # max |logit|
    agree: int  # rows whose argmax is the same


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks is a failed check: the others still have something to say."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


def of_model(model: Model, tokenizer: Any, memory_gb: float) -> Iterator[Check]:
    """What a given model is tested for beside :func:`verify` and :func:`in_place`."""
    yield guarded("model", lambda: memory(model, memory_gb))
    yield drafter(model)
    yield guarded("drafted text", lambda: text(model, tokenizer))


def verify(name: str, model: Decoder, tokenizer: Any) -> Check:
    """Compare passes over a text with single steps over it."""
    prompt = list(tokenizer.encode(PROMPT))
    following = list(islice(cycle(prompt), max(SIZES)))
    return judge(name, dtype_name(model.dtype), differences(model, prompt, following, SIZES))


def differences(
    model: Decoder, prompt: Sequence[int], following: Sequence[int], sizes: Sequence[int]
) -> list[Difference]:
    """Compare one pass over `following[:N]`, after `prompt`, with N single steps, for every N."""
    import mlx.core as mx

    from mlx_redrafter.budget.costs import bare_pass
    from mlx_redrafter.cache.layer import Kept, new_caches
    from mlx_redrafter.cache.slabs import capacity_for

    bare = bare_pass(model)

    def run(tokens: Sequence[int], start: int, caches: list[Kept]) -> tuple[mx.array, list[Kept]]:
        ids = mx.array(list(tokens), mx.int32)
        hidden, caches = bare(ids, mx.array([start], mx.int32), caches)
        logits = model.logits(hidden).astype(mx.float32)
        mx.eval(logits, caches)
        return logits, caches

    capacity = capacity_for(len(prompt) + len(following))
    _, prefix = run(prompt, 0, new_caches(model.caches, capacity, model.dtype))
    rows, caches = [], prefix
    for i, token in enumerate(following[: max(sizes)]):
        row, caches = run([token], len(prompt) + i, caches)
        rows.append(row)
    single = mx.concatenate(rows)  # (N, V)
    found = []
    for n in sizes:
        many, _ = run(following[:n], len(prompt), prefix)
        same = many.argmax(-1) == single[:n].argmax(-1)
        numbers: list[Any] = [
            mx.abs(many - single[:n]).max().item(),
            mx.abs(single[:n]).max().item(),
            same.sum().item(),
        ]
        found.append(Difference(n, *numbers))
    return found


def judge(name: str, dtype: str, found: Sequence[Difference]) -> Check:
    """ok: the same choices; warn: rounding changed one; fail: more than rounding."""
    rows = sum(d.nodes for d in found)
    agree = sum(d.agree for d in found)
    worst = max(found, key=lambda d: d.largest)
    exact = [d.nodes for d in found if d.largest == 0]
    text = (
        f"{dtype}, N = {found[0].nodes}..{found[-1].nodes}: same choice in {agree} of {rows} rows"
    )
    if len(exact) == len(found):
        text += ", logits bit-equal for every N"
    else:
        text += f", largest logit difference {worst.largest:.1e} (N = {worst.nodes})"
    facts = {"dtype": dtype, "by_nodes": [asdict(d) for d in found]}
    limit = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    # Written so that NaN, which compares with nothing, fails too.
    if not all(d.largest <= limit * d.scale for d in found):
        return Check(name, "fail", f"{text}: more than rounding explains", facts)
    if agree < rows:
        return Check(name, "warn", f"{text}: rounding decides near ties", facts)
    return Check(name, "ok", text, facts)


def memory(model: Model, memory_gb: float) -> Check:
    """Do the weights and a full cache fit into this machine's memory?"""
    from mlx.utils import tree_flatten

    from mlx_redrafter.cache.layer import bytes_of
    from mlx_redrafter.drafters.loading import module_of

    config, dtype = model.target.config, model.target.dtype
    arrays: list[Any] = list(tree_flatten(model.target.parameters()))
    if model.drafter is not None:
        arrays += tree_flatten(module_of(model.drafter).parameters())
    weights = sum(value.nbytes for _, value in arrays)
    token = config.kept_per_token * dtype.size
    kinds = model.drafter.caches if model.drafter is not None else ()
    token += sum(kind.empty(1, dtype).nbytes for kind in kinds)
    full = bytes_of([*model.target.caches, *kinds], config.max_positions, dtype)
    known = {"weights_bytes": weights, "cache_bytes": full, "memory_gb": round(memory_gb, 1)}
    text = (
        f"{model.name}, {dtype_name(model.target.dtype)}: {weights / 1e9:.2f} GB of weights, "
        f"{full / 1e9:.2f} GB of cache for {config.max_positions:,} tokens"
    )
    if (room := memory_gb * 2**30 - weights) < full:
        most = max(int(room / token), 0)
        enough = most >= min(CAPACITY, config.max_positions)
        text += f"; about {most:,} tokens fit into {memory_gb:.0f} GB"
        return Check("model", "ok" if enough else "warn", text, known)
    return Check("model", "ok", text, known)


def drafter(model: Model) -> Check:
    """Which drafter was loaded; one that does not fit was refused before."""
    if model.drafter_folder is None:
        return Check("drafter", "ok", "none: drafts come from the text alone", {"folder": None})
    folder = str(model.drafter_folder)
    return Check("drafter", "ok", f"fits: {model.drafter_folder.name}", {"folder": folder})


def text(model: Model, tokenizer: Any) -> Check:
    """Is an answer the same with drafting and without?"""
    from mlx_redrafter.api import stream_generate
    from mlx_redrafter.tree.shape import TreeShape

    def answer(tree: TreeShape) -> list[int]:
        responses = stream_generate(model, tokenizer, PROMPT * 2, ANSWER, tree=tree)
        return [response.token for response in responses]

    plain, drafted = answer(TreeShape.plain()), answer(TreeShape())
    same = next(
        (i for i, pair in enumerate(zip(plain, drafted, strict=False)) if len(set(pair)) > 1),
        min(len(plain), len(drafted)),
    )
    known = {"tokens": len(plain), "same": same}
    if plain == drafted:
        return Check("drafted text", "ok", f"all {same} tokens are those of plain decoding", known)
    detail = f"parts from plain decoding at token {same + 1}"
    if dtype_name(model.target.dtype) == "float32" and blas.rows_alone():
        return Check("drafted text", "fail", f"{detail}: in float32 this must not happen", known)
    return Check("drafted text", "warn", f"{detail}: rounding decides near ties", known)


def in_place(model: Model) -> Check:
    """Are the KV slabs written where they are while a step is in flight ahead?

    MLX copies a buffer that an unfinished operation still reads: the memory of a drafted answer,
    beyond what was there before it, counted in slabs. It depends on the model, for MLX runs a
    limited number of command buffers ahead.
    """
    import mlx.core as mx

    from mlx_redrafter.cache.session import Session
    from mlx_redrafter.decoding.request import Request
    from mlx_redrafter.decoding.sampling import SamplingParams
    from mlx_redrafter.tree.shape import TreeShape

    target = model.target
    layers = len(target.caches)
    session = Session().open(target.caches, CAPACITY, target.dtype)
    mx.eval(session.caches)
    slab = target.config.kept_per_token * CAPACITY * target.dtype.size / layers
    extra = 0.0
    for count in (4, ANSWER):  # the first answer compiles
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        request = Request([1, 2, 3, 4], SamplingParams(), TreeShape(), count, session)
        for _ in model.engine.generate(request):
            pass
        extra = (mx.get_peak_memory() - before) / slab
    text = f"a step ahead needs the memory of {extra:.1f} of {layers} layers' slabs"
    if extra > layers / 2:
        return Check("KV cache", "warn", f"{text}: most are copied in every step", {"slabs": extra})
    return Check("KV cache", "ok", text, {"slabs": round(extra, 2)})
