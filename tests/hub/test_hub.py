"""Finding models: names, errors of the hub, drafters, tokenizers. No network."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub._tree_cache import TREE_CACHE_FORMAT_VERSION
from huggingface_hub.utils import filter_repo_objects

from mlx_redrafter.errors import HubError
from mlx_redrafter.hub import builtin
from mlx_redrafter.hub.folders import PATTERNS, find_drafter, resolve
from mlx_redrafter.runtime import paths
from mlx_redrafter.runtime.paths import BUILTIN, cache_dir
from mlx_redrafter.text.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a unit test must not ask the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def fail_with(monkeypatch, error):
    def raise_it(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_it)


def http_error(kind, status):
    """The exception class of the hub client with a response of this status."""
    error = kind.__new__(kind)
    OSError.__init__(error, "the server's own text\nin two lines")
    error.response = SimpleNamespace(status_code=status)
    return error


def message(name, revision=None):
    with pytest.raises(HubError) as caught:
        resolve(name, revision)
    text = str(caught.value)
    assert "\n" not in text
    return text


def model_folder(path, **config):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def test_import_loads_no_heavy_library():
    code = (
        "import sys, mlx_redrafter.hub.folders, mlx_redrafter.hub.builtin\n"
        "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'huggingface_hub', 'filelock', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_local_folder_is_used_as_it_is(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "org" / "name")
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/name") == folder


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name(name):
    assert "empty" in message(name)


def test_wrong_local_paths(tmp_path):
    file = tmp_path / "model.bin"
    file.touch()
    assert "is a file" in message(str(file))
    assert "has no config.json" in message(str(tmp_path))
    assert "there is no folder" in message(str(tmp_path / "missing"))
    assert "has no revisions" in message(str(model_folder(tmp_path / "m")), "main")


def test_a_near_miss_of_the_built_in_name():
    assert "did you mean smollm2-135m?" in message("SmolLM2")
    assert "did you mean" not in message("gpt2")


def test_the_built_in_name(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "ensure", lambda kind: tmp_path / kind)
    monkeypatch.setattr(builtin, "device_kind", lambda: "cpu")
    assert resolve(BUILTIN) == tmp_path / "cpu"
    assert "has no revisions" in message(BUILTIN, "main")


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [
        ("org/name", None, None),
        ("org/name", "v1", "v1"),
        ("org/name@refs/pr/3", None, "refs/pr/3"),
        ("org/name@v1", "v1", "v1"),
    ],
)
def test_a_hub_id_becomes_a_snapshot(monkeypatch, tmp_path, name, revision, asked):
    calls = []

    def download(repo, revision, allow_patterns, ignore_patterns=None):
        calls.append((repo, revision, allow_patterns, ignore_patterns))
        return str(model_folder(tmp_path))

    def listing(repo, revision):
        calls.append((repo, revision))
        return ["config.json", "README.md", "model.safetensors", "pytorch_model.bin"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listing)
    assert resolve(name, revision, also=["*.bin"]) == tmp_path
    assert calls == [
        ("org/name", asked, [*PATTERNS], ["*/*"]),
        ("org/name", asked),
        ("org/name", asked, ["config.json", "model.safetensors"], None),
    ]
    (tmp_path / "model.safetensors").touch()
    calls.clear()
    assert resolve(name, revision) == tmp_path
    assert calls == [("org/name", asked, [*PATTERNS], ["*/*"])], "the weights were there"


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
REPOSITORIES = {
    "Medusa heads beside a model": ([*SHARDS, "medusa_lm_head.safetensors", "medusa_lm_head.pt"],
        [*SHARDS, "medusa_lm_head.safetensors"]),
    "only a pickle of Medusa heads": (["medusa_lm_head.pt"], ["medusa_lm_head.pt"]),
    "a pickle of Medusa heads beside a model": ([*SHARDS, "medusa_lm_head.bin"],
        [*SHARDS, "medusa_lm_head.bin"]),
    "consolidated": ([*SHARDS, "consolidated.safetensors", "consolidated.00.pth"], SHARDS),
    "in folders": (["model.safetensors", "original/model.safetensors", "fp16/model.safetensors"],
        ["model.safetensors"]),
    "other programs": (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "rust_model.ot",
        "flax_model.msgpack", "onnx/model.onnx", "model.gguf"], ["model.safetensors"]),
    "precisions": (["model.safetensors", "model.fp16.safetensors", "model-bf16.safetensors",
        "model_q4.safetensors", "model.int8-00001-of-00002.safetensors"], ["model.safetensors"]),
    "precisions of parts": ([*SHARDS, "model-00001-of-00003.fp16.safetensors"], SHARDS),
    "only precisions": (["model.fp16.safetensors", "model.bf16.safetensors"],
        ["model.bf16.safetensors"]),
    "adapters": ([*SHARDS, "adapter_model.safetensors", "adapters.safetensors"], SHARDS),
    "trainer": (["model.safetensors", "optimizer.safetensors", "training_args.bin"],
        ["model.safetensors"]),
    "one file and parts": ([*SHARDS, "model.safetensors"], ["model.safetensors"]),
    "two builds": ([*SHARDS, "model-00001-of-00001.safetensors"],
        ["model-00001-of-00001.safetensors"]),
    "parts by subject": (["model-a.safetensors", "model-b.safetensors"],
        ["model-a.safetensors", "model-b.safetensors"]),
    "old names": (["weights.00.safetensors", "weights.01.safetensors"],
        ["weights.00.safetensors", "weights.01.safetensors"]),
    "a drafter": (["model.safetensors", "drafter/config.json", "drafter/model.safetensors",
        "drafter/adapter_model.safetensors"],
        ["model.safetensors", "drafter/config.json", "drafter/model.safetensors"]),
    "pickles": (["pytorch_model-00001-of-00001.bin", "optimizer.bin", "onnx/model.bin"],
        ["pytorch_model-00001-of-00001.bin"]),
}  # fmt: skip
SMALL = ["config.json", "tokenizer.json", "model.safetensors.index.json", "original/params.json"]


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        (SHARDS, SHARDS),
        (SHARDS[:1], SHARDS),
        (["heart.safetensors", "model.safetensors"], ["heart.safetensors", "model.safetensors"]),
        (["model-00001-of-00009.safetensors"], ["model.safetensors"]),
        (None, ["model.safetensors"]),
    ],
)
def test_an_index_chooses_among_what_a_repository_has(monkeypatch, tmp_path, named, wanted):
    files = [*SHARDS, "model.safetensors", "heart.safetensors", "config.json"]
    index = json.dumps({"weight_map": dict(enumerate(named)) if named else 3})
    asked = []

    def download(repo, revision, allow_patterns, ignore_patterns=None):
        (model_folder(tmp_path) / "model.safetensors.index.json").write_text(index)
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
    resolve("org/name")
    assert sorted(asked[1]) == sorted(["config.json", *wanted])


@pytest.mark.parametrize("name", REPOSITORIES)
def test_only_the_files_of_one_model_are_downloaded(monkeypatch, tmp_path, name):
    files, wanted = REPOSITORIES[name]
    asked = set()

    def download(repo, revision, allow_patterns, ignore_patterns=None):
        asked.update(
            filter_repo_objects(
                [*SMALL, *files], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(model_folder(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [*SMALL, *files])
    resolve("org/name", also=["*.bin", "*.pt"])
    assert asked == {*wanted, *SMALL[:3]}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "medusa_lm_head.pt"])
def test_pickles_are_told_what_to_run(monkeypatch, tmp_path, file):
    folder, files = model_folder(tmp_path), ["config.json", "README.md", file]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
    assert message("org/name") == (
        f"the weights of org/name are a PyTorch file ({file}); make a folder of them first: "
        "mlx-redrafter convert org/name --out FOLDER"
    )
    assert "convert org/name@v1 --out" in message("org/name", "v1")
    assert resolve("org/name", also=["*.bin", "*.pt"]) == folder
    files += ["model.safetensors"]
    assert resolve("org/name") == folder


def test_two_different_revisions():
    assert "give one" in message("org/name@v1", "v2")


def test_gated_is_not_reported_as_missing(monkeypatch):
    fail_with(monkeypatch, http_error(errors.GatedRepoError, 403))
    text = message("org/name")
    assert "accept its licence at https://huggingface.co/org/name" in text
    assert "hf auth login" in text


def test_repository_and_revision_not_found(monkeypatch):
    fail_with(monkeypatch, http_error(errors.RepositoryNotFoundError, 401))
    assert "check the spelling" in message("org/name")
    fail_with(monkeypatch, http_error(errors.RevisionNotFoundError, 404))
    assert "has no revision 'v9'" in message("org/name@v9")


def test_refused_and_broken_transfers(monkeypatch):
    fail_with(monkeypatch, http_error(errors.HfHubHTTPError, 401))
    assert "refuses access" in message("org/name")
    fail_with(monkeypatch, http_error(errors.HfHubHTTPError, 500))
    assert "run the same command again" in message("org/name")
    fail_with(monkeypatch, RuntimeError("connection\nreset"))
    assert "(connection reset)" in message("org/name")


def test_no_network_and_offline_mode(monkeypatch):
    fail_with(monkeypatch, errors.LocalEntryNotFoundError("two\nlines"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "cannot be reached" in message("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = message("org/name@v1")
    assert "org/name@v1 is not in the Hugging Face cache" in text
    assert "HF_HUB_OFFLINE is set" in text


def test_the_real_client_offline(monkeypatch, tmp_path):
    from huggingface_hub._snapshot_download import snapshot_download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE is set" in message("org/name")
    assert "not a valid Hugging Face id" in message("org/na--me..")
    repo = tmp_path / "models--org--name"
    folder = model_folder(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert "org/name is only partly in the Hugging Face cache" in message("org/name")
    (folder / "model.safetensors").touch()
    assert resolve("org/name") == folder
    # What the client keeps of a listing says what else there is.
    tree = {name: {"size": 1, "blob_id": "0"} for name in ("config.json", "drafter/config.json")}
    (repo / "trees").mkdir()
    kept = {"format_version": TREE_CACHE_FORMAT_VERSION, "files": tree}
    (repo / "trees" / f"{'0' * 40}.json").write_text(json.dumps(kept))
    assert "only partly" in message("org/name")


def test_full_and_read_only_disks(monkeypatch):
    fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert "no space left" in message("org/name") and "HF_HOME" in message("org/name")
    fail_with(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    assert "cannot be written" in message("org/name")


def test_a_repository_without_config(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert "has no config.json" in message("org/name")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MLX_REDRAFTER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mlx-redrafter"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "Library" / "Caches" / "mlx-redrafter"


def test_find_drafter(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ASSETS", tmp_path / "package" / "assets")
    plain = model_folder(tmp_path / "plain")
    marked = model_folder(tmp_path / "marked", mlx_redrafter={"model": BUILTIN})
    assert find_drafter(BUILTIN, plain) is None
    shipped = model_folder(tmp_path / "package" / "assets" / "smollm2-135m-drafter")
    assert find_drafter(BUILTIN, plain) == shipped
    assert find_drafter(str(marked), marked) == shipped
    assert find_drafter("org/name", plain) is None
    own = model_folder(plain / "drafter")
    assert find_drafter(BUILTIN, plain) == own


def test_tokenizer_stops_at_all_end_ids(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<e0>", "<e1>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model_folder(tmp_path, eos_token_id=0)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1]}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "T"}'
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token_ids == {0, 1}
    assert loaded.has_chat_template
    stream = loaded.detokenizer
    for token in loaded.encode("né🦊"):
        stream.add_token(token)
    stream.finalize()
    assert stream.text == "né🦊"


def test_missing_and_broken_tokenizers(tmp_path):
    model_folder(tmp_path)
    with pytest.raises(HubError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(HubError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_is_told_what_to_do(tmp_path):
    (tmp_path / "my model.gguf").write_bytes(b"GGUF")
    with pytest.raises(HubError, match=r"GGUF file; .* convert '.*/my model\.gguf' --out FOLDER"):
        resolve(str(tmp_path / "my model.gguf"))
