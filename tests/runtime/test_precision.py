"""A stage's precision: what autocast computes in, and what `auto` resolves to."""

import pytest
import torch

from pipeline.runtime.precision import autocast, resolve_precision


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_stages_precision_is_that_of_matrix_products(precision, kind):
    weight = torch.ones(2, 2, requires_grad=True)
    with autocast(precision):
        assert (weight @ weight).dtype == kind
    assert weight.dtype == torch.float32


@pytest.mark.parametrize(("capability", "precision"), [("AVX512", "bf16"), ("AVX2", "fp32"), ("DEFAULT", "fp32")])
def test_auto_is_the_fast_precision_of_this_machine(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert resolve_precision("auto") == precision
    assert resolve_precision("bf16") == "bf16"
    with autocast("auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
