"""Ways to break a file: as a whole, a value of its JSON, a tensor of its weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from tiny_gguf import BOOL, F32, I32, STRING, U32, metadata, write_gguf

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 269060552\n" % (
    b"a" * 64
)
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>no</body></html>\n"
OTHER_JSON = [
    "null",
    "[]",
    "{}",
    '"text"',
    "3",
    "true",
    "[1, 2]",
    "[{}]",
    "NaN",
    '{"a": }',
    "{'a': 1}",
]
VALUES: list[Any] = [
    None, "text", "", -1, 0, 1, 2, 1.5, 1e308, float("nan"), float("inf"), 10**12, 10**30, True,
    [], {}, [1], ["a"], {"a": 1}, [None], [[]], "\0", "\ud800", "../..", "e" * 3000,
]  # fmt: skip


def whole(random: random.Random, path: Path) -> str:
    """Something else in the place of a file; what it is."""
    data = path.read_bytes() if path.is_file() else b""
    ways: dict[str, Callable[[], object]] = {
        "cut off": lambda: path.write_bytes(data[: random.randrange(len(data) + 1)]),
        "cut off near its end": lambda: path.write_bytes(data[: -random.randrange(1, 9)]),
        "empty": lambda: path.write_bytes(b""),
        "white space": lambda: path.write_bytes(b" \n\n"),
        "a pointer of Git LFS": lambda: path.write_bytes(POINTER),
        "a web page": lambda: path.write_bytes(PAGE),
        "random bytes": lambda: path.write_bytes(random.randbytes(300)),
        "zeros": lambda: path.write_bytes(bytes(len(data))),
        "UTF-16": lambda: path.write_bytes(data[:4000].decode("latin-1").encode("utf-16")),
        "not UTF-8": lambda: path.write_bytes(b'{"caf\xe9": "\xff"}'),
        "other JSON": lambda: path.write_text(random.choice(OTHER_JSON)),
        "deep JSON": lambda: path.write_text(random.choice(["[", '{"a":']) * 100_000),
        "flipped bytes": lambda: path.write_bytes(flipped(random, data)),
        "twice": lambda: path.write_bytes(data + data),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "missing": path.unlink,
        "a link to nowhere": lambda: (path.unlink(), path.symlink_to("nowhere")),
        "a link to itself": lambda: (path.unlink(), path.symlink_to(path.name)),
        "another file": lambda: shutil.copy(random.choice(beside(path)), path),
    }  # fmt: skip
    way = random.choice(list(ways))
    ways[way]()
    return f"{path.name}: {way}"


def beside(path: Path) -> list[Path]:
    others = sorted(f for f in path.parent.rglob("*") if f.is_file() and f != path)
    return others or [Path(__file__)]


def flipped(random: random.Random, data: bytes, within: int = 0) -> bytes:
    """A few bytes of the first `within` are others."""
    changed = bytearray(data)
    for _ in range(random.randrange(1, 6)):
        if changed:
            changed[random.randrange(min(within, len(changed)) or len(changed))] = random.randrange(
                256
            )
    return bytes(changed)


def value(random: random.Random, path: Path) -> str:
    """One value of a JSON file is another, somewhere in it, or missing."""
    document = json.loads(path.read_text())
    at, where = document, ""
    while True:
        if not isinstance(at, (dict, list)) or not at:
            return whole(random, path)
        key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
        where += f"[{key!r}]"[:60]
        inside = at[key]  # type: ignore[index]
        if isinstance(inside, (dict, list)) and inside and random.random() < 0.7:
            at = inside
            continue
        if random.random() < 0.2:
            del at[key]  # type: ignore[arg-type]
            new = "removed"
        else:
            at[key] = random.choice(VALUES)  # type: ignore[index,call-overload]
            new = repr(at[key])[:60]  # type: ignore[index]
        path.write_text(json.dumps(document))
        return f"{path.name}{where}: {new}"


def known_key(random: random.Random, path: Path, keys: dict[str, Any]) -> str:
    """A key of a configuration that the file has or could have, with a wrong value."""
    document = json.loads(path.read_text())
    key = random.choice(list(keys))
    document[key] = random.choice([*VALUES, keys[key]])
    path.write_text(json.dumps(document))
    return f"{path.name}[{key!r}]: {document[key]!r}"[:200]


CONFIG_KEYS: dict[str, Any] = {
    "model_type": "mamba", "architectures": 3, "hidden_size": 63, "num_hidden_layers": 3,
    "num_attention_heads": 7, "num_key_value_heads": 3, "vocab_size": 5, "rms_norm_eps": "1e-5",
    "rope_theta": "x", "rope_scaling": {"type": "unheard of"}, "max_position_embeddings": "8192",
    "tie_word_embeddings": "no", "quantization": {"group_size": 32, "bits": 4},
    "quantization_config": {"quant_method": "awq", "bits": 4}, "eos_token_id": ["</s>"],
    "head_dim": 31, "sliding_window": -3, "layer_types": ["a"], "rope_parameters": {"rope_type": 3},
    "torch_dtype": "float99", "hidden_act": "swish?", "attention_bias": "yes", "text_config": [1],
    "intermediate_size": 97, "partial_rotary_factor": 7, "quantization ": {"bits": 3},
}  # fmt: skip
TOKENIZER_KEYS: dict[str, Any] = {
    "tokenizer_class": "NoSuchTokenizer", "eos_token": {"content": 3}, "bos_token": 7,
    "chat_template": 5, "added_tokens_decoder": {"x": 1}, "extra_special_tokens": ["a", 3],
    "model_max_length": "long", "auto_map": {"AutoTokenizer": ["a.b", None]}, "tool_parser_type": 4,
    "additional_special_tokens": [1], "unk_token": ["u"], "pad_token": {}, "padding_side": "up",
    "add_bos_token": "maybe", "clean_up_tokenization_spaces": "x",
}  # fmt: skip
DRAFTER_KEYS: dict[str, Any] = {
    "hidden_size": 63, "vocab_size": 4, "exit_dim": -1, "num_draft_layers": 5, "rnn": "perhaps",
    "cell": "lstm", "initial_state": 4, "context_layers": [99], "head": "borrowed",
    "draft_vocab_size": 10**6, "quantization": {"bits": 7, "group_size": 3}, "model_type": "bert",
}  # fmt: skip


def tensors(random: random.Random, path: Path) -> str:
    """A weight file that is whole, and whose tensors are not what they should be."""
    arrays = dict(mx.load(str(path)))  # type: ignore[arg-type]
    name = random.choice(sorted(arrays))
    old = arrays[name]
    ways: dict[str, Callable[[], Any]] = {
        "missing": lambda: arrays.pop(name),
        "one row short": lambda: old[:-1],
        "flat": lambda: old.reshape(-1),
        "of rank 5": lambda: old.reshape(1, 1, 1, 1, -1),
        "a number": lambda: mx.array(1.0),
        "of no rows": lambda: old[:0],
        "int32": lambda: old.astype(mx.int32),
        "bool": lambda: old.astype(mx.bool_),
        "complex": lambda: old.astype(mx.complex64),
        "uint8": lambda: old.astype(mx.uint8),
        "NaN": lambda: mx.full(old.shape, float("nan")),
        "infinite": lambda: mx.full(old.shape, float("inf")),
        "turned over": lambda: old.T if old.ndim == 2 else old[None],
        "twice under other names": lambda: arrays.update({f"{name}.extra": old, f"x.{name}": old}),
        "packed as quantised ones are": lambda: arrays.update({f"{name[:-6]}scales": old[:1]}),
        "all missing": arrays.clear,
        "under other names": lambda: rename(arrays),
    }
    way = random.choice(list(ways))
    new = ways[way]()
    if isinstance(new, mx.array) and way != "missing":
        arrays[name] = new
    path.unlink()
    mx.save_safetensors(str(path), arrays)
    return f"{path.name}: {name} {way}"


def rename(arrays: dict[str, Any]) -> None:
    for name in sorted(arrays):
        arrays[f"module.{name}"] = arrays.pop(name)


def header(random: random.Random, path: Path) -> str:
    """A safetensors file whose header does not tell the truth about the rest."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    infos, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = random.choice([n for n in infos if n != "__metadata__"])
    size = random.choice([0, 2**63, 2**64 - 1, len(data), 10**9])
    dtype = random.choice(["F99", "F64", "I64", "F8_E4M3", 3, None])
    shape = random.choice([[2**62], [-1, 3], "x", None, [], [10**6] * 2])
    offsets = random.choice([[0, 2**62], [-5, 9], [9, 0], [1], None, "x"])
    ways: dict[str, Callable[[], Any]] = {
        "length": lambda: struct.pack("<Q", size) + data[8:],
        "dtype": lambda: infos[name].update(dtype=dtype),
        "shape": lambda: infos[name].update(shape=shape),
        "offsets": lambda: infos[name].update(data_offsets=offsets),
        "an entry": lambda: infos.update({name: random.choice(VALUES[:-3])}),
        "metadata": lambda: infos.update({"__metadata__": random.choice([3, [], {"a": 1}, None])}),
    }  # fmt: skip
    way = random.choice(list(ways))
    new = ways[way]()
    if not isinstance(new, bytes):
        text = json.dumps(infos).encode()
        new = struct.pack("<Q", len(text)) + text + body
    path.write_bytes(new)
    return f"{path.name}: header, {way} of {name}"


def index(random: random.Random, path: Path) -> str:
    """An index beside complete weights that knows other files, or is none."""
    file = path.with_name("model.safetensors.index.json")
    arrays = sorted(mx.load(str(path)))
    maps: list[Any] = [
        dict.fromkeys(arrays, "model-00001-of-00002.safetensors"),
        dict.fromkeys(arrays[::2], path.name), {}, [], None, "text",
        {name: random.choice([3, None, "../x", "", "/etc/passwd", "a\0b", []]) for name in arrays},
    ]  # fmt: skip
    document = random.choice([{"weight_map": random.choice(maps)}, {"metadata": 3}, [], "x", None])
    file.write_text(json.dumps(document))
    return f"{file.name}: {document!r}"[:200]


def line_of(random: random.Random, path: Path) -> str:
    """One line of a file of JSON lines is not what it should be."""
    lines = path.read_text().splitlines()
    at = random.randrange(len(lines))
    row = json.loads(lines[at])
    key = random.choice(list(row))
    row[key] = random.choice(VALUES)
    new = random.choice(
        [json.dumps(row), json.dumps(row), random.choice(OTHER_JSON), lines[at][:-4], "\0"]
    )
    path.write_text("\n".join([*lines[:at], new, *lines[at + 1 :]]) + "\n")
    return f"{path.name} line {at + 1}: {new[:80]!r}"


def gguf(random: random.Random, path: Path) -> str:
    """A GGUF file with damaged bytes, or with metadata of the wrong kind."""
    data = path.read_bytes()
    way = random.choice(["head", "head", "cut", "type", "type", "type", "missing", "whole"])
    if way == "whole":
        return whole(random, path)
    if way == "cut":
        path.write_bytes(
            data[: random.choice([random.randrange(len(data)), random.randrange(5000)])]
        )
        return f"{path.name}: {path.stat().st_size} bytes of {len(data)}"
    if way == "head":
        path.write_bytes(flipped(random, data, random.choice([24, 200, 4000, 7000])))
        return f"{path.name}: flipped bytes"
    meta = metadata()
    key = random.choice(list(meta))
    if way == "missing":
        del meta[key]
    else:
        meta[key] = random.choice([
            (STRING, "text"), (STRING, ""), (STRING, []), (STRING, ["a"]), (U32, 0), (U32, 7),
            (U32, 2**32 - 1), (I32, -1), (I32, [1, 2]), (F32, float("nan")), (F32, [0.5] * 300),
            (BOOL, True),
        ])  # fmt: skip
    write_gguf(path, meta)
    return f"{path.name}: {key} {'missing' if way == 'missing' else repr(meta[key])[:60]}"


def of_model(random: random.Random, folder: Path) -> str:
    """Something in a model folder."""
    weights = folder / "model.safetensors"
    ways: list[Callable[[], str]] = [
        lambda: whole(random, random.choice(sorted(folder.iterdir()))),
        lambda: whole(random, random.choice(sorted(folder.iterdir()))),
        lambda: known_key(random, folder / "config.json", CONFIG_KEYS),
        lambda: known_key(random, folder / "config.json", CONFIG_KEYS),
        lambda: known_key(random, folder / "tokenizer_config.json", TOKENIZER_KEYS),
        lambda: value(random, folder / "tokenizer.json"),
        lambda: value(random, folder / "generation_config.json"),
        lambda: tensors(random, weights),
        lambda: header(random, weights),
        lambda: index(random, weights),
    ]
    return random.choice(ways)()


def of_drafter(random: random.Random, folder: Path) -> str:
    """Something in a drafter folder."""
    weights = folder / "model.safetensors"
    ways: list[Callable[[], str]] = [
        lambda: whole(random, random.choice(sorted(folder.iterdir()))),
        lambda: known_key(random, folder / "config.json", DRAFTER_KEYS),
        lambda: value(random, folder / "config.json"),
        lambda: tensors(random, weights),
        lambda: header(random, weights),
    ]
    return random.choice(ways)()


def of_any(random: random.Random, path: Path) -> str:
    """A JSON file, a file of JSON lines or any other."""
    if path.suffix == ".json" and random.random() < 0.7:
        return value(random, path)
    if path.suffix == ".jsonl" and random.random() < 0.7:
        return line_of(random, path)
    return whole(random, path)


def inside(random: random.Random, folder: Path) -> str:
    """Any file of a folder with folders."""
    files = sorted(
        f for f in folder.rglob("*") if f.is_file() and not f.name.endswith((".png", ".lock"))
    )
    path = random.choice(files)
    return os.path.join(path.parent.name, of_any(random, path))
