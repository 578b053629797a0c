"""The self-test finds what is wrong, and nothing that is right; and what `info` reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_redrafter import cli, doctor, info
from mlx_redrafter.doctor import Check, Difference


def judged(largest: float, agree: int = 4, dtype: str = "float32") -> Check:
    return doctor.judge("pass", dtype, [Difference(4, largest, 10.0, agree)])


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
    found = doctor.differences(model, list(range(20)), list(range(30, 40)), [2, 5, 9])
    assert [d.nodes for d in found] == [2, 5, 9]
    assert all(d.agree == d.nodes and d.largest <= 1e-4 * d.scale for d in found)


def test_a_model_that_forgets_its_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = doctor.tiny_model(tmp_path)
    right = type(model).__call__

    def forgets(self, tokens, positions, mask, slots, kv, write, layers=()):  # type: ignore[no-untyped-def]
        hidden, inner, _ = right(self, tokens, positions, mask, slots, kv, write, layers)
        return hidden, inner, kv

    monkeypatch.setattr(type(model), "__call__", forgets)
    found = doctor.differences(model, list(range(20)), list(range(30, 40)), [2, 5])
    assert doctor.judge("pass", "float32", found).mark == "fail"


def test_doctor_reports_and_its_exit_code_is_that_of_the_worst(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "SIZES", range(2, 4))
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    names = [check["name"] for check in report["checks"]]
    assert (result.exit_code, report["passed"]) == (0, True)
    assert names == [
        "versions",
        "machine",
        "BLAS",
        "compiled graphs",
        "verify, tiny model",
        "verify, built-in",
        "attention",
        "KV cache",
    ]
    assert "not in the cache" in report["checks"][5]["detail"]

    def broken() -> Check:
        raise RuntimeError("kernel\nlost")

    monkeypatch.setattr(doctor, "in_place", broken)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "fail KV cache            RuntimeError: kernel lost"


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
    assert facts["drafter"] is None
    result = CliRunner().invoke(cli.app, ["info", str(tmp_path)])
    assert result.exit_code == 0
    said = f"no trained drafter for {tmp_path} was found, so drafts come from the text itself; "
    assert said in result.stdout


def test_info_counts_packed_weights_unpacked(tmp_path: Path) -> None:
    import mlx.core as mx

    packed, scales, biases = mx.quantize(mx.ones((64, 128)), group_size=32, bits=4)
    weights = {"a.weight": packed, "a.scales": scales, "a.biases": biases, "n.weight": mx.ones(3)}
    assert info._parameters(weights, {"group_size": 32, "bits": 4}) == 64 * 128 + 3
    assert info._parameters(weights, {"group_size": 64, "a": {"group_size": 32}}) == 64 * 128 + 3


@pytest.mark.parametrize(("hidden", "fits"), [(128, True), (64, False)])
def test_info_says_whether_a_drafter_fits_and_why_not(
    tmp_path: Path, hidden: int, fits: bool
) -> None:
    import mlx.core as mx

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
    mx.save_safetensors(str(drafter / "model.safetensors"), {"x": mx.zeros((10,))})
    facts = info.collect(str(model), str(drafter))["drafter"]
    assert facts["fits"] is fits
    assert facts["cell"] == "elman"
    assert facts["bytes_per_draft_step"] == 40
    assert fits or "hidden size 64, but this model's is 128" in facts["problem"]
    result = CliRunner().invoke(cli.app, ["info", str(model), "-d", str(drafter)])
    assert result.exit_code == 0
    assert ("yes" if fits else "no:") in result.stdout
