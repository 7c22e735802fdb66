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
    with torch.no_grad():
        torch.testing.assert_close(Gelu()(x), expected, rtol=1e-5, atol=1e-6)
        if dtype == torch.bfloat16:
            every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(2, 256, 128).view(torch.bfloat16)
            turned = every.transpose(0, 2)
            assert Gelu()(turned).shape == turned.shape
            torch.testing.assert_close(
                Gelu()(turned), F.gelu(turned, approximate="tanh"), rtol=0, atol=0, equal_nan=True
            )
