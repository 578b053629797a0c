"""The tokenizer inside a GGUF file, rebuilt as `tokenizer.json` and `tokenizer_config.json`.

Byte-level BPE keeps its merges in the file; the splitter before it is named, not stored.
SentencePiece BPE keeps scores instead of merges: they are turned back into merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import ConvertError, one_line
from mlx_redrafter.hub.gguf.splitters import SPLITTERS
from mlx_redrafter.text import turn_ends

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"
_ROLES = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))


class GgufTokenizer:
    """The `tokenizer.ggml.*` values of a file. Raises ConvertError for kinds that are not read."""

    def __init__(self, metadata: Mapping[str, Any], file_name: str) -> None:
        self._metadata, self._file = metadata, file_name
        kind, splitter = self._get("model"), self._get("pre")
        self.tokens: list[str] = self._get("tokens") or []
        types = self._get("token_type")
        self.kinds: list[int] = types or [_NORMAL] * len(self.tokens)
        if not types:
            # Nothing says which tokens are markup; those with a role or a well-known name are.
            for number in (*self.end_ids(), *map(self.token_id, dict(_ROLES).values())):
                if number is not None:
                    self.kinds[number] = _CONTROL
        needed = "scores" if kind == "llama" else "merges"
        if kind not in ("gemma4", "gpt2", "llama") or (
            kind == "gpt2" and splitter not in SPLITTERS
        ):
            raise ConvertError(
                f"{file_name} has the tokenizer {kind!r} with the splitter {splitter!r}; needed: "
                f"'llama', or 'gpt2' with one of {', '.join(sorted(SPLITTERS))}; convert "
                "the model's Hugging Face version"
            )
        if not self.tokens or not self._get(needed) or len(self.kinds) != len(self.tokens):
            raise ConvertError(f"{file_name} lacks its tokenizer's tokens, types or {needed}")
        self.style = str(splitter) if kind == "gpt2" else "spm"

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into the folder."""
        self.build().save(str(folder / "tokenizer.json"))

    def config(self, max_length: int) -> dict[str, Any]:
        """`tokenizer_config.json`."""
        named = {f"{role}_token": self.named(key) for role, key in _ROLES}
        template = self._get("chat_template", "tokenizer.")
        return {
            **{role: token for role, token in named.items() if token is not None},
            **({"chat_template": template} if template else {}),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": self._of_kind(_CONTROL),
            "model_max_length": max_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    def token_id(self, key: str) -> int | None:
        """The id of a named token such as `eos`, None where the file names none."""
        return next(iter(self._ids(key)), None)

    def end_ids(self) -> list[int]:
        """The ids that end an answer: those that the file names, then those of well-known names.

        Only markup has such a name: a token whose type says that it is ordinary text, or which
        stands for unknown text, ends nothing.
        """
        named = [i for key in ("eos", "eot", "eom") for i in self._ids(key)]
        typed, unknown = self._get("token_type"), self.token_id("unknown")
        markup = {
            token: i
            for i, token in enumerate(self.tokens)
            if i != unknown and (not typed or self.kinds[i] in (_CONTROL, _USER_DEFINED))
        }
        known = sorted(markup[token] for token in turn_ends.known(markup))
        return list(dict.fromkeys([*named, *known]))

    def _ids(self, role: str) -> list[int]:
        """Ids of a role, of one key or of several; those outside the vocabulary mean none."""
        found: list[int] = []
        for key in (f"{role}_token_id", f"{role}_token_ids"):
            given = self._get(key)
            found += given if isinstance(given, list) else [] if given is None else [given]
        return [number for number in found if 0 <= number < len(self.tokens)]

    def named(self, key: str) -> str | None:
        number = self.token_id(key)
        return None if number is None else self.tokens[number]

    def build(self) -> Tokenizer:
        """The tokenizer itself. Raises ConvertError."""
        from tokenizers import AddedToken

        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        make = self._sentencepiece if self.style == "spm" else self._byte_level
        try:
            tokenizer = make(vocabulary)
        except Exception as error:  # the library raises nothing more precise
            raise ConvertError(
                f"the tokenizer in {self._file} makes no sense ({one_line(error)}); "
                "download it again"
            ) from error
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in self._of_kind(_CONTROL)]
        )
        tokenizer.add_tokens(
            [AddedToken(t, special=False, normalized=False) for t in self._of_kind(_USER_DEFINED)]
        )
        self._add_ends(tokenizer)
        return tokenizer

    def _byte_level(self, vocabulary: dict[str, int]) -> Tokenizer:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        merges = self._stored_merges()
        splitter = SPLITTERS[self.style]
        whole = {"ignore_merges": True} if splitter.whole else {}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **whole))
        steps: list[Any] = []
        if splitter.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        for expression in splitter.expressions:
            steps.append(pre_tokenizers.Split(Regex(expression), "isolated"))
        usual = not splitter.expressions
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=usual))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if splitter.composed:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self, vocabulary: dict[str, int]) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, normalizers

        known = self._get("model") == "gemma4"
        merges = (
            self._stored_merges() if known else _merges(vocabulary, self._get("scores"), self.kinds)
        )
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                unk_token=self.named("unknown"),
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        normal: list[Any] = [normalizers.Replace(" ", _SPACE)]
        decode: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
        decode.append(decoders.Fuse())
        if self._get("add_space_prefix") in (None, True):
            normal.insert(0, normalizers.Prepend(_SPACE))
            decode.append(decoders.Strip(content=" ", left=1))
        tokenizer.normalizer = normalizers.Sequence(normal)
        tokenizer.decoder = decoders.Sequence(decode)
        return tokenizer

    def _stored_merges(self) -> list[tuple[str, str]]:
        pairs = (pair.split(" ", 1) for pair in self._get("merges"))
        return [(first, second) for first, second in pairs]

    def _add_ends(self, tokenizer: Tokenizer) -> None:
        """Let every text begin (or end) with the tokens that the file asks for."""
        from tokenizers import processors

        add_bos, add_eos = self._get("add_bos_token"), self._get("add_eos_token")
        begins = self.style == "spm" or SPLITTERS[self.style].begins
        wanted_bos = begins if add_bos is None else add_bos
        bos = self.named("bos") if wanted_bos else None
        eos = self.named("eos") if add_eos else None
        if bos is None and eos is None:
            return
        single = [bos, "$A", eos]
        pair = [*single, f"{bos}:1" if bos else None, "$B:1", f"{eos}:1" if eos else None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in single if part],
            pair=[part for part in pair if part],
            special_tokens=[(t, self.tokens.index(t)) for t in dict.fromkeys((bos, eos)) if t],
        )

    def _of_kind(self, kind: int) -> list[str]:
        return [t for t, found in zip(self.tokens, self.kinds, strict=True) if found == kind]

    def _get(self, key: str, prefix: str = "tokenizer.ggml.") -> Any:
        return self._metadata.get(prefix + key)


def _merges(
    vocabulary: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose joint has the best score: every split of every piece."""
    ranked: list[tuple[float, tuple[str, str]]] = []
    for piece, number in vocabulary.items():
        if kinds[number] != _NORMAL:
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        splits.sort(key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
        ranked += [(-scores[number], split) for split in splits]
    ranked.sort(key=lambda item: item[0])
    return [split for _, split in ranked]
