"""The self-test finds what is wrong, and nothing that is right; and what `info` reports."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from conftest import engine_of
from tiny_chat import write_chat_model
from typer.testing import CliRunner

from mlx_redrafter.cache.packed import Packing
from mlx_redrafter.cli import doctor, info
from mlx_redrafter.cli import main as cli
from mlx_redrafter.evaluation import model_checks
from mlx_redrafter.evaluation.model_checks import Check, Difference
from mlx_redrafter.kernels import verdicts
from mlx_redrafter.kernels.products import Order, Shape
from mlx_redrafter.models import Decoder
from mlx_redrafter.runtime import blas
from mlx_redrafter.terminal import console
from mlx_redrafter.tree.shape import TreeShape


def judged(largest: float, agree: int = 4, dtype: str = "float32") -> Check:
    return model_checks.judge("pass", dtype, [Difference(4, largest, 10.0, agree)])


def test_differences_are_judged_by_their_size() -> None:
    assert judged(0.0).mark == "ok"
    assert "bit-equal" in judged(0.0).detail
    assert judged(1e-5).mark == "ok"
    assert judged(1e-5, agree=3).mark == "warn"
    assert judged(0.1).mark == "fail"
    assert judged(0.1, dtype="float16").mark == "ok"
    assert judged(float("nan")).mark == "fail"


def test_a_pass_over_n_tokens_is_compared_with_single_steps(tmp_path: Path) -> None:
    model = doctor.tiny_model(tmp_path)
    found = model_checks.differences(model, list(range(20)), list(range(30, 40)), [2, 5, 9])
    assert [d.nodes for d in found] == [2, 5, 9]
    assert all(d.agree == d.nodes and d.largest <= 1e-4 * d.scale for d in found)


def test_a_model_that_forgets_its_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = doctor.tiny_model(tmp_path)
    right = type(model).__call__

    def forgets(self, tokens, positions, mask, slots, caches, layers=()):  # type: ignore[no-untyped-def]
        before = [slab + 0 for slab in caches._before.values()]
        found = right(self, tokens, positions, mask, slots, caches, layers)
        caches._after = dict(enumerate(before))
        return found

    monkeypatch.setattr(type(model), "__call__", forgets)
    found = model_checks.differences(model, list(range(20)), list(range(30, 40)), [2, 5])
    assert model_checks.judge("pass", "float32", found).mark == "fail"


def test_doctor_reports_and_its_exit_code_is_that_of_the_worst(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    monkeypatch.setattr(doctor, "SIZES", range(2, 4))
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert os.environ["MLX_ENABLE_TF32"] == "0"
    report = json.loads(result.stdout)
    names = [check["name"] for check in report["checks"]]
    assert (result.exit_code, report["passed"]) == (0, True)
    assert names == [
        "versions",
        "machine",
        *(["BLAS"] if blas.used() else []),
        "compiled graphs",
        "verify, tiny model",
        "attention",
        "verify, built-in",
        "KV cache",
        "few-row products",
    ]
    assert all("not in the cache" in check["detail"] for check in report["checks"][-3:-1])

    def broken() -> Check:
        raise RuntimeError("kernel\nlost")

    monkeypatch.setattr(doctor, "attention", broken)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "fail attention           RuntimeError: kernel lost" in result.stdout.splitlines()


def test_what_kernels_were_found_good_for_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.delenv(verdicts.VARIABLE, raising=False)
    assert doctor.few_rows().detail == "MLX's own (no Metal)" or mx.metal.is_available()
    monkeypatch.setattr(verdicts, "metal", lambda: True)
    monkeypatch.setattr(verdicts, "conditions", dict)
    assert doctor.few_rows().detail == "not tried: no quantised model was loaded"
    shape = Shape(64, 96, 4, 32, mx.float16)
    found = verdicts.Verdict({5: 1.25, 8: 0.9}, Order(2, True), True)
    monkeypatch.setattr(verdicts, "_asked", lambda names, _: dict.fromkeys(names, found))
    verdicts.verdicts([shape], lambda _: None)
    check = doctor.few_rows()
    assert check.mark == "ok" and check.detail == (
        "fast; 64x96-4-32-float16: 5: x1.25, 8: x0.90, exact in MLX's order"
    )
    found = verdicts.Verdict(error="it took more than 300 s")
    verdicts.found([verdicts.named(shape)], verdicts.PROBE, lambda _: None, again=True)
    check = doctor.few_rows()
    assert check.mark == "warn" and "it took more" in check.detail
    monkeypatch.setenv(verdicts.VARIABLE, "off")
    assert doctor.few_rows().detail == "MLX's own (MLX_REDRAFTER_KERNEL=off)"


def run_doctor(*options: object) -> tuple[int, dict[str, dict[str, Any]]]:
    result = CliRunner().invoke(cli.app, ["doctor", "--json", *map(str, options)])
    return result.exit_code, {c["name"]: c for c in json.loads(result.stdout)["checks"]}


def test_a_given_model_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "SIZES", range(2, 4))
    monkeypatch.setattr(doctor, "SIZES", range(2, 4))
    # Nothing but the passes over several tokens is of interest here, and compiling takes long.
    monkeypatch.setattr("mlx_redrafter.api.parts._compiler_present", lambda: False)
    model = write_chat_model(tmp_path / "tiny")
    code, found = run_doctor("-m", model)
    assert code == 0 and "verify, built-in" not in found
    assert found["model"]["facts"]["cache_bytes"] == 2048 * 3 * 2 * 2 * 8 * 4
    assert "none" in found["drafter"]["detail"]
    text = found["drafted text"]["facts"]
    assert 0 < text["tokens"] == text["same"] <= 32
    assert "bit-equal" in found["verify, model"]["detail"] or not blas.rows_alone()
    assert found["KV cache"]["mark"] == "ok"


@pytest.mark.parametrize("option", ["-m", "-d"])
def test_a_wrong_model_or_drafter_is_one_line(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_chat_model(tmp_path / "tiny")
    given = ["-m", str(model), "-d"] if option == "-d" else ["-m"]
    result = CliRunner().invoke(cli.app, ["doctor", *given, str(tmp_path / "nowhere")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere" in result.stderr and result.stderr.count("\n") == 1


def test_a_model_that_does_not_fit_into_memory_is_a_warning(tmp_path: Path) -> None:
    model = SimpleNamespace(name="m", target=doctor.tiny_model(tmp_path), drafter=None)
    assert model_checks.memory(model, 16.0).mark == "ok"  # type: ignore[arg-type]
    weights = 4 * (512 * 128 + 2 * (128 * 12 * 64 + 3 * 128 * 256 + 2 * 128) + 128)
    small = (weights + 100 * 2 * 2 * 2 * 64 * 4) / 2**30
    found = model_checks.memory(model, small)  # type: ignore[arg-type]
    assert found.mark == "warn" and "about 100 tokens fit" in found.detail


@pytest.mark.parametrize(("exact", "mark"), [(True, "fail"), (False, "warn")])
def test_a_drafted_text_that_parts_from_the_plain_one_is_found(
    exact: bool, mark: str, byte_target: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: object, tree: TreeShape) -> list[Any]:
        return [SimpleNamespace(token=t) for t in ((5, 6, 7) if tree.drafts else (5, 6, 8))]

    monkeypatch.setattr("mlx_redrafter.api.stream_generate", stream)
    monkeypatch.setattr(blas, "rows_alone", lambda: exact)
    found = model_checks.text(SimpleNamespace(target=byte_target), tokenizer)  # type: ignore[arg-type]
    assert found.mark == mark and "at token 3" in found.detail


def test_slabs_that_are_copied_are_a_warning(
    byte_target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(target=byte_target, engine=engine_of(byte_target, None, compiled=False))
    assert model_checks.in_place(model).mark == "ok"  # type: ignore[arg-type]
    monkeypatch.setattr("mlx.core.get_peak_memory", lambda: 2**40)
    found = model_checks.in_place(model)  # type: ignore[arg-type]
    assert found.mark == "warn" and "copied in every step" in found.detail


def test_where_the_gpu_multiplies_nothing_is_said_of_a_blas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor.tiny_model(tmp_path)
    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(mx.cpu))
    assert blas.used() == blas.status().name
    assert "BLAS" in CliRunner().invoke(cli.app, ["info", str(tmp_path)]).stdout
    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(mx.gpu))
    assert blas.used() is None and not blas.rows_alone()
    assert "BLAS" not in CliRunner().invoke(cli.app, ["info", str(tmp_path)]).stdout
    names = [check.name for check in itertools.islice(doctor._all(None), 4)]
    assert names == ["versions", "machine", "compiled graphs", "verify, tiny model"]
    assert console.facts({"mlx": "1", "blas": None, "seed": 0}) == "mlx 1, seed 0"


def test_doctor_wants_the_mlx_that_is_installed_with_this_package() -> None:
    needed = ".".join(map(str, doctor.NEEDED_MLX))
    required = [r for r in importlib.metadata.requires("mlx-redrafter") or () if r[:3] == "mlx"]
    assert sum(f">={needed};" in r.replace(" ", "") for r in required) == 2
    facts = {"python": "3", "mlx_redrafter": "0", "mlx": "0.32.3", "mlx_lm": "0"}
    old = doctor._versions(facts)
    assert old.mark == "fail" and old.detail.endswith(f"mlx {needed} or newer is needed")
    assert doctor._versions({**facts, "mlx": needed}).mark == "ok"


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.compiler().mark == "warn"
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert "MLX_DISABLE_COMPILE" in doctor.compiler().detail


def test_the_runs_of_attention_paths_are_short() -> None:
    path = {1: "vector", 2: "vector", 3: "unfused", 4: "full", 5: "full"}
    assert doctor._runs(path) == "N 1-2 vector, 3 unfused, 4-5 full"


def test_info_counts_a_model(tmp_path: Path) -> None:
    doctor.tiny_model(tmp_path)
    facts = info.collect(str(tmp_path), context=100)
    layer = 128 * (4 + 2 + 2 + 4) * 64 + 3 * 128 * 256 + 2 * 128
    assert facts["model"]["parameters"] == 512 * 128 + 2 * layer + 128
    assert facts["model"]["bits_per_weight"] == 32
    assert facts["model"]["cache_bytes"] == 100 * 2 * 2 * 2 * 64 * 4
    assert facts["model"]["cache_bytes_per_token"] == 2 * 2 * 2 * 64 * 4
    packed = info.collect(str(tmp_path), packing=Packing(4, 32))["model"]
    assert packed["cache_bytes_per_token"] == 2 * 2 * 2 * 64 * (4 + 2 * 32 / 32) / 8
    assert facts["drafter"] is None
    result = CliRunner().invoke(cli.app, ["info", str(tmp_path)])
    assert result.exit_code == 0
    said = f"no trained drafter for {tmp_path} was found, so drafts come from the text itself; "
    assert said in result.stdout


def test_info_counts_packed_weights_unpacked(tmp_path: Path) -> None:
    from mlx_lm import utils

    doctor.tiny_model(tmp_path)
    plain = info.collect(str(tmp_path))["model"]
    model, config = utils.load_model(tmp_path)
    quantised, config = utils.quantize_model(model, config, 32, 4)
    utils.save_model(tmp_path, quantised)
    utils.save_config(config, tmp_path / "config.json")
    packed = info.collect(str(tmp_path))["model"]
    assert packed["parameters"] == plain["parameters"]
    assert packed["bits_per_weight"] < 8


@pytest.mark.parametrize(("hidden", "fits"), [(128, True), (64, False)])
def test_info_says_whether_a_drafter_fits_and_why_not(
    tmp_path: Path, hidden: int, fits: bool
) -> None:
    import mlx.core as mx

    from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
    from mlx_redrafter.models.weights import parameters

    model, drafter = tmp_path / "model", tmp_path / "drafter"
    model.mkdir()
    drafter.mkdir()
    doctor.tiny_model(model)
    config = {
        "model_type": "recurrent_drafting_drafter",
        "hidden_size": hidden,
        "vocab_size": 512,
        "exit_dim": 2 * hidden,
        "num_draft_layers": 1,
        "rnn": True,
    }
    (drafter / "config.json").write_text(json.dumps(config))
    weights = parameters(ReDrafter(ReDrafterConfig.from_dict(config)))
    mx.save_safetensors(str(drafter / "model.safetensors"), weights)
    facts = info.collect(str(model), str(drafter))["drafter"]
    assert facts["fits"] is fits
    assert facts["cell"] == "elman"
    assert facts["bytes_per_draft_step"] == sum(value.nbytes for value in weights.values())
    assert fits or "hidden size 64, but this model's is 128" in facts["problem"]
    result = CliRunner().invoke(cli.app, ["info", str(model), "-d", str(drafter)])
    assert result.exit_code == 0
    assert ("yes" if fits else "no:") in result.stdout
