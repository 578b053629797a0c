"""What cuts a text into words before byte-level BPE joins bytes: GGUF names it and stores nothing.

Names: llama-vocab.cpp of https://github.com/ggml-org/llama.cpp; expressions: those of the models'
tokenizer.json, which it quotes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _ENDINGS + r"|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}|"
    r" ?[^\s{marks}\p{{N}}]+{after}|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS: dict[str, Any] = {"letters": r"\p{L}", "marks": r"\p{L}", "after": r"[\r\n]*"}
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}|"
    r"{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASES = {"upper": _UPPER, "lower": _LOWER}
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Splitter(NamedTuple):
    """Regular expressions, one after the other; GPT-2's own, built into ByteLevel, where there are
    none.

    Args:
        digits: single digits are cut off first.
        whole: a word of the vocabulary is one token, whatever its merges say.
        begins: texts begin with the first token unless the file says otherwise.
        composed: characters are composed first (NFC).
    """

    expressions: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    begins: bool = False
    composed: bool = False


_GPT2, _DIGITS = Splitter(), Splitter(digits=True)
_SINGLE = Splitter((_WORDS.format(numbers=r"\p{N}", **_LETTERS),))
_THREE = Splitter((_WORDS.format(numbers=r"\p{N}{1,3}", **_LETTERS),))
_LLAMA3 = _THREE._replace(whole=True, begins=True)
_GPT4O = Splitter((_CASED.format(numbers=r"\p{N}{1,3}", ending=f"{_ENDINGS}?", **_CASES),))
_QWEN35 = {"letters": r"[\p{L}\p{M}]", "marks": r"\p{L}\p{M}", "after": r"[\r\n]*"}
SPLITTERS: dict[str, Splitter] = {
    **dict.fromkeys(("exaone4", "gpt-2", "mellum", "olmo", "phi-2"), _GPT2),
    **dict.fromkeys(("codeshell", "exaone", "refact", "smollm", "starcoder"), _DIGITS),
    "command-r": _DIGITS._replace(composed=True),
    **dict.fromkeys(("hunyuan", "megrez", "stablelm2"), _SINGLE),
    **dict.fromkeys(("deepseek-r1-qwen", "qwen2"), _SINGLE._replace(composed=True)),
    "qwen35": Splitter((_WORDS.format(numbers=r"\p{N}", **_QWEN35),), composed=True),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "glm4", "smaug-bpe"), _THREE),
    **dict.fromkeys(("falcon3", "llama-bpe", "llama-v3", "llama3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("gpt-4o", "kanana2", "llama4", "minimax-m2"), _GPT4O),
    "tekken": Splitter(
        (_CASED.format(numbers=r"\p{N}", ending="", **_CASES),), whole=True, begins=True
    ),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Splitter(_DEEPSEEK)),
    "seed-coder": Splitter(
        (
            _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|"
            r"\s+(?!\S)|\s+",
        )
    ),
}
