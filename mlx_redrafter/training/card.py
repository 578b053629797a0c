"""The model card of a trained drafter: what it is, how it was made, and what was measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_redrafter.drafters import calibration
from mlx_redrafter.evaluation import positions
from mlx_redrafter.hub.builtin import REPO
from mlx_redrafter.models.files import weight_files
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.runtime.paths import BUILTIN
from mlx_redrafter.training import kinds, lines, plots
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.kinds.trainee import Trainee
from mlx_redrafter.training.shards import Conversation

FILE = "README.md"


@dataclass(frozen=True)
class Recipe:
    """What a drafter was trained on.

    Args:
        prompts: different prompts.
        answers: number of answers by their temperature.
        answer_tokens: tokens of all answers.
        positions: positions processed by the fit; those seen twice count twice.
    """

    prompts: int
    answers: dict[float, int]
    answer_tokens: int
    positions: int

    @classmethod
    def of(cls, conversations: Iterable[Conversation], positions: int) -> Recipe:
        prompts, answers, tokens = set(), Counter[float](), 0
        for conversation in conversations:
            prompts.add(hash(tuple(conversation.prompt)))
            answers[conversation.temp] += 1
            tokens += len(conversation.answer)
        return cls(len(prompts), dict(sorted(answers.items())), tokens, positions)


def render(
    folder: Path,
    config: TrainConfig,
    recipe: Recipe,
    *,
    made_by: str,
    measured_by: str,
    chats: bool = True,
) -> str:
    """The text of the README.md beside a drafter.

    Args:
        folder: of the drafter: config.json, weights, evaluation.json and perhaps plots.
        made_by, measured_by: the exact command lines.
        chats: has the model a chat template?

    Raises:
        OptionError: the drafter was not evaluated.
    """
    found = positions.read(folder)
    model, shown, kind = positions.short_name(config.model), lines.Shown(config), kinds.of(config)
    place = shown.path(config.out / "drafter")
    sections = [
        _front_matter(config.model, config.kind),
        f"# {kind.title} for {model}\n\n"
        + _summary(model, kind, lines.use(shown.model, chats, place)),
        f"## Tokens per step\n\n{_live(found, folder)}",
        f"## Draft by draft\n\n{_by_position(found, folder)}",
        f"## Drafter\n\n{_drafter(folder, kind)}",
        f"## Training\n\n{_training(config, recipe, folder)}",
        f"## Commands\n\nMade by\n\n{_code(made_by)}\n\nMeasured by\n\n{_code(measured_by)}\n\n"
        f"Paths on this page are relative to the folder in which this drafter is `{place}`.",
        f"## Conditions\n\n{_conditions(found['conditions'])}",
        f"## Limits\n\n{_limits(model, config, found['conditions'], chats)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(model: str, kind: str = TrainConfig.kind) -> str:
    base = REPO if model == BUILTIN else model
    rows = ["---", "library_name: mlx"]
    # A path on somebody's disk is no model of the hub.
    if base.count("/") == 1 and positions.short_name(base) == base:
        rows.append(f"base_model: {base.partition('@')[0]}")
    tags = ("mlx", "mlx-redrafter", "speculative-decoding", kind)
    return "\n".join([*rows, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _summary(model: str, kind: type[Trainee], use: str) -> str:
    return (
        f"A drafter for speculative decoding with {model} ({kind.title}, {kind.paper}). It "
        f"proposes tokens that {model} checks, several in one pass. The text is that of {model} "
        f"alone, token for token; how good the drafter is decides only how fast it comes.\n\n"
        + _code(f"pip install mlx-redrafter\n{use}")
    )


def _live(found: Mapping[str, Any], folder: Path) -> str:
    """Two tables: tokens per step by group, and acceptance by depth over all prompts."""
    rows = found["live"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    cells: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["temp"]), {})[row["group"]] = row
    body = [
        [shape, f"{temp:g}", *(f"{by[g]['tokens_per_step']:.2f}" for g in groups)]
        for (shape, temp), by in cells.items()
    ]
    deepest = max(len(row["per_depth"]) for row in rows)
    depths = [
        [shape, f"{temp:g}", *(f"{p:.0%}" for p in by["all"]["per_depth"])]
        + ["0%"] * (deepest - len(by["all"]["per_depth"]))
        for (shape, temp), by in cells.items()
    ]
    parts = [
        f"Decoded live with {_prompts(found['conditions'])} that were kept out of training. Plain "
        "decoding yields 1 token per step.",
        _table(["tree", "temperature", *groups], body),
        "Share of the steps in which the draft at a depth was accepted, all prompts:",
        _table(["tree", "temperature", *(f"depth {k + 1}" for k in range(deepest))], depths),
        *_pictures(folder, {"Acceptance by depth": plots.ACCEPTANCE}),
    ]
    return "\n\n".join(parts)


def _by_position(found: Mapping[str, Any], folder: Path) -> str:
    """Agreement by draft position, and how far the drafter's probabilities can be trusted."""
    rows = found["teacher_forced"]
    count = len(rows[0]["agreement"])
    body = [
        [
            row["group"], f"{row['temp']:g}", str(row["positions"][0]),
            _number(row["agreement"][0]), _numbers(row["agreement"]),
            _numbers(row["conditional"]), _number(row["ece"], 3),
        ]
        for row in rows
    ]  # fmt: skip
    titles = [
        "answers", "temperature", "positions", "position 1", f"positions 1-{count}",
        f"positions 1-{count}, conditional", "ECE",
    ]  # fmt: skip
    ece = [
        f"temperature {row['temp']:g}: {_numbers(row['ece_by_depth'], 3)}"
        for row in rows
        if row["group"] == "all"
    ]
    parts = [
        f"Along the model's own answers to {found['conditions']['recorded']} of these prompts: the "
        "share of the drafter's first choices that are the answer's token, all earlier tokens "
        "being true; conditional: where its earlier choices were right too. Sampled drafts know "
        "the noise of the draw, as in decoding. ECE is the expected calibration error of the first "
        "choice's probability (10 bins, weighted over the positions). The tables behind it are in "
        f"`{positions.FILE}`.",
        _table(titles, body),
        f"ECE by draft position, {'; '.join(ece)}.",
        *_fitted(found["calibration"].get("fitted")),
        *_pictures(folder, {"Calibration": plots.CALIBRATION}),
    ]
    return "\n\n".join(parts)


def _fitted(fit: Mapping[str, Any] | None) -> list[str]:
    """How far sampled drafts can be trusted, before and after the fit. None: an evaluation from
    before there was one."""
    if fit is None:
        return []
    body = []
    for name in ("before", "after"):
        table = fit[name]
        count = sum(table["count"])
        means = [
            sum(n * (p or 0.0) for n, p in zip(table["count"], table[column], strict=True)) / count
            for column in ("probability", "agreed")
        ]
        body.append([name, str(count), *map(_number, means), _number(table["ece"], 3)])
    return [
        "Under sampling a draft's probability is taken to be `share x softmax(sharpness x (logits "
        "+ noise x what the draw adds))`. Fitted to the answers to "
        f"{fit['fitted_to']} prompts at temperature {fit['temp']:g}: sharpness "
        f"{fit['sharpness']:g}, noise {fit['noise']:g}, share {fit['share']:g} "
        f"(`{calibration.FILE}`). First choices along the other answers:",
        _table(["", "positions", "mean probability", "right", "ECE"], body),
    ]


def _drafter(folder: Path, kind: type[Trainee]) -> str:
    """Nothing is loaded: sizes come from the configuration and the files."""
    own = kind.about(folder)
    bits = (read_json(folder / "config.json").get("quantization") or {}).get("bits", "none")
    size = sum(file.stat().st_size for file in weight_files(folder))
    rows = [
        *own.rows,
        ["quantisation (bits)", str(bits)],
        ["weights in the file", f"{size:,} bytes, {own.stored:,} parameters"],
        ["read per draft step", f"{own.per_step:,} parameters"],
        ["read once per draft", f"{own.per_draft:,} parameters"],
    ]
    return _table(["", ""], rows)


def _training(config: TrainConfig, recipe: Recipe, folder: Path) -> str:
    origin = "from a file" if config.prompts else "written by the model itself"
    if config.answers:
        origin += f", besides those of {config.answers.name}"
    total = sum(recipe.answers.values())
    temps = ", ".join(f"{t:g} ({n / total:.0%})" for t, n in recipe.answers.items())
    rows = [
        ["prompts", f"{recipe.prompts:,} ({origin})"],
        ["answers", f"{total:,}, written by {positions.short_name(config.model)} itself"],
        ["answer temperatures", temps],
        ["answer tokens", f"{recipe.answer_tokens:,}"],
        ["positions processed", f"{recipe.positions:,}"],
    ]
    options = [f"{k}: {_value(v)}" for k, v in lines.Shown(config).values().items()]
    return "\n\n".join(
        [
            _table(["", ""], rows),
            "Configuration:",
            _code("\n".join(options), "yaml"),
            *_pictures(folder, {"Loss and agreement": plots.CURVES}),
        ]
    )


def _conditions(facts: Mapping[str, Any]) -> str:
    rows = [
        [name, _prompts(facts) if name == "prompts" else str(value)]
        for name, value in facts.items()
        if value is not None
    ]
    return _table(["", ""], rows)


def _limits(model: str, config: TrainConfig, facts: Mapping[str, Any], chats: bool) -> str:
    bits = f"{facts['model_bits']}-bit weights" if facts.get("model_bits") else "these weights"
    own = config.system_prompt is not None
    prompt = "the system prompt of the configuration" if own else "no system prompt of one's own"
    asked = f"its chat template and {prompt}" if chats else "no chat template"
    lines = [
        f"For exactly this model: {model} with {bits}, {asked}. With a "
        "fine-tune, another quantisation or another template the text stays right, for every "
        "draft is checked, but fewer drafts are accepted.",
        f"Measured{' without that system prompt,' * own} on answers of at most "
        f"{facts['max_tokens']} tokens, trained on answers of at "
        f"most {config.max_tokens}: longer ones, and other languages and subjects than those of "
        "the prompts, are not measured.",
        "Tokens per step is not speed: a step that drafts takes longer than a plain one, by how "
        "much depends on the machine (`mlx-redrafter bench speed`).",
        "Agreement along given answers is not acceptance: the live table is what decoding gets.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _prompts(facts: Mapping[str, Any]) -> str:
    groups = facts["prompts"]
    return f"{sum(groups.values())} prompts ({', '.join(f'{n} {g}' for g, n in groups.items())})"


def _pictures(folder: Path, files: Mapping[str, str]) -> list[str]:
    return [f"![{text}]({name})" for text, name in files.items() if (folder / name).is_file()]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _numbers(values: Sequence[float | None], digits: int = 2) -> str:
    return " ".join(_number(v, digits) for v in values)


def _value(value: Any) -> str:
    """As YAML."""
    return json.dumps(value, ensure_ascii=False)
