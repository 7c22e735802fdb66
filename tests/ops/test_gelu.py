"""GELU on a CPU is torch's."""

import pytest
import torch
import torch.nn.functional as F

from scmdm.ops.gelu import Gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_torch(dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4])]).to(dtype)
    x.requires_grad_()
    found, expected = Gelu()(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    d = torch.linspace(-1, 3, len(x)).to(dtype)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, d)[0] for y in (found, expected)))


def test_every_bfloat16_number_has_torchs_value():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(2, 256, 128).view(torch.bfloat16)
    turned = every.transpose(0, 2)
    assert Gelu()(turned).shape == turned.shape
    torch.testing.assert_close(Gelu()(turned), F.gelu(turned, approximate="tanh"), rtol=0, atol=0, equal_nan=True)


def test_more_numbers_than_are_done_at_once():
    x = torch.randn(3, 200_001)
    torch.testing.assert_close(Gelu()(x), F.gelu(x, approximate="tanh"))
