"""GELU without gradients is GELU with gradients."""

import pytest
import torch
import torch.nn.functional as F

from scmdm.model.activation import Gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_those_of_torch(dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4])]).to(dtype)
    expected = F.gelu(x, approximate="tanh")
    assert torch.equal(Gelu()(x), expected)
    one_bit = {torch.bfloat16: 2**-7}.get(dtype, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(Gelu()(x), expected, rtol=one_bit, atol=1e-6)
        many = x.repeat(100)  # several parts
        assert torch.equal(Gelu()(many), Gelu()(x).repeat(100))
