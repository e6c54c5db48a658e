"""What inspect says of an adapter, against the dense update."""

import pytest
from adapter_factory import dense_changes

from pipeline.adapters.inspect import inspect
from pipeline.config.commands import Inspect


def test_inspect_measures_against_the_dense_update(factory, capsys):
    a, b = factory.adapter("plain"), factory.adapter("rslora", 2)
    report = inspect(Inspect(adapter=str(a), against=str(b), base=str(factory.bases["llama"])))
    assert (report["kind"], report["rank"], report["alpha"], report["rslora"]) == ("LORA", 3, 5, False)
    x, y = dense_changes(a), dense_changes(b)
    for module, row in report["modules"].items():
        weight = factory.base("llama").get_submodule(module).weight
        assert row["norm"] == pytest.approx(x[module].norm().item())
        assert row["of_weight"] == pytest.approx((x[module].norm() / weight.norm()).item())
        if module in y:
            assert row["cosine"] == pytest.approx(
                ((x[module] * y[module]).sum() / x[module].norm() / y[module].norm()).item()
            )
    assert sum("cosine" in row for row in report["modules"].values()) == 2
    out = factory.compose("a + b", folders={"a": a, "b": b})
    inspect(Inspect(adapter=str(out)))
    assert "made from a + b (exact)" in capsys.readouterr().out
