"""What is left out where, by the markers of tests."""

from __future__ import annotations

from types import SimpleNamespace

import conftest
import mlx.core as mx
import pytest


@pytest.mark.parametrize(("device", "left_out"), [(mx.cpu, []), (mx.gpu, ["bits"])])
def test_bits_are_asserted_on_a_cpu_only(
    device: mx.DeviceType, left_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def item(name: str) -> SimpleNamespace:
        marks: list[pytest.MarkDecorator] = []
        return SimpleNamespace(keywords={name}, marks=marks, add_marker=marks.append)

    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(device))
    items = [item("bits"), item("slow")]
    conftest.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    skipped = {name: mark for i in items for mark in i.marks for name in i.keywords}
    assert list(skipped) == left_out
    assert all("last bits" in mark.kwargs["reason"] for mark in skipped.values())
