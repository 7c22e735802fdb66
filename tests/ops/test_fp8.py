"""Products in FP8: the emulation against torch's kernel and exact products, and the gradients of a linear map."""

import pytest
import torch

from scmdm.errors import UserError
from scmdm.models.dit import DiTConfig
from scmdm.models.linear import Linear, multiply_in_fp8
from scmdm.ops.fp8 import fp8_unusable_because, linear_fp8, multiply, multiply_emulated, quantize_rows

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def matrix(rows, columns, seed=0, spread=0.0):
    """Normal numbers; `spread` is the range of magnitudes of the rows, in powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-spread, spread / 4, rows)
    return torch.randn(rows, columns, generator=generator) * sizes[:, None]


def errors_of_rows(found, exact):
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(E4M3, 0.08), (E5M2, 0.12)])
@pytest.mark.parametrize("spread", [0.0, 12.0, 24.0])
def test_every_row_keeps_its_precision(dtype, tolerance, spread):
    """However much larger other rows are; the emulation and torch's kernel on this CPU."""
    a, b = matrix(48, 64, 0, spread), matrix(32, 64, 1)
    exact = a.double() @ b.double().t()
    operands = quantize_rows(a, dtype), quantize_rows(b, E4M3)
    emulated = multiply_emulated(*operands, torch.float32)
    assert errors_of_rows(emulated, exact).max() < tolerance
    try:
        kernel = multiply(*operands, torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no FP8 product on this CPU: {error}")
    assert errors_of_rows(kernel, emulated.double()).max() < 2**-8


def test_numbers_of_few_bits_are_exact():
    a, b = (torch.randint(-7, 8, (16, 32), generator=torch.Generator().manual_seed(seed)).float() for seed in (0, 1))
    scales = 2.0 ** torch.randint(-40, 40, (16, 1), generator=torch.Generator().manual_seed(2))
    a[:, 0] = b[:, 0] = 448 / 64  # a row's largest number: its scale is a power of two
    found = multiply_emulated(quantize_rows(a * scales, E4M3), quantize_rows(b, E4M3), torch.float32)
    assert torch.equal(found, (a * scales) @ b.t())


def test_zeros_stay_and_what_is_not_finite_shows():
    a = matrix(3, 16)
    a[1] = 0
    rows = quantize_rows(a, E4M3)
    assert not rows.values_MK[1].float().any() and rows.scale_M1.isfinite().all()
    for wrong in (float("nan"), float("inf")):
        a[0, 5] = wrong
        found = multiply_emulated(quantize_rows(a, E5M2), rows, torch.float32)
        assert not found[0].isfinite().any() and found[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_depends_on_its_own_row_alone(dtype):
    """So that a sequence's hidden states do not depend on the rest of a batch."""
    x, weight = matrix(24, 32).to(dtype), matrix(16, 32, 1)
    whole = linear_fp8(x, weight, None, multiply_emulated)
    assert torch.equal(linear_fp8(x[3:7], weight, None, multiply_emulated), whole[3:7])


@pytest.mark.parametrize("rows", [1, 7, 48])
def test_gradients_of_a_linear_map(rows):
    """Also for numbers of rows that the kernel of the weight's gradient does not take."""
    x, weight = matrix(rows, 32, 0).requires_grad_(), matrix(16, 32, 1).requires_grad_()
    bias, gradient = matrix(1, 16, 2)[0].requires_grad_(), matrix(rows, 16, 3, 6.0)
    found = linear_fp8(x, weight, bias, multiply_emulated)
    exact = torch.nn.functional.linear(*(t.detach().double().requires_grad_() for t in (x, weight, bias)))
    wanted = [gradient.double() @ weight.detach().double(), gradient.double().t() @ x.detach().double()]
    assert errors_of_rows(found, exact).max() < 0.08
    d_x, d_weight, d_bias = torch.autograd.grad(found, (x, weight, bias), gradient)
    assert errors_of_rows(d_x, wanted[0]).max() < 0.15
    assert (d_weight - wanted[1]).norm() < 0.12 * wanted[1].norm() and d_weight.dtype == weight.dtype
    torch.testing.assert_close(d_bias, gradient.sum(0))


def test_what_is_not_trained_is_neither_kept_nor_computed():
    """Frozen weights under adapters, and passes without gradients."""
    x, weight = matrix(16, 32).requires_grad_(), matrix(16, 32, 1).requires_grad_()

    def kept(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.dtype) or t, lambda t: t):
            found = function()
        return sizes, found

    trained, _ = kept(lambda: linear_fp8(x, weight, None, multiply_emulated))
    frozen, y = kept(lambda: linear_fp8(x, weight.detach(), None, multiply_emulated))
    assert E4M3 in trained and E4M3 not in frozen and torch.bfloat16 not in trained
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    with torch.no_grad():
        assert not kept(lambda: linear_fp8(x, weight, None, multiply_emulated))[0]


def test_a_gate_and_autocast_are_those_of_other_linear_maps():
    plain, switched = Linear(32, 16), Linear(32, 16)
    switched.load_state_dict(plain.state_dict())
    multiply_in_fp8(switched, emulated=True)
    x, gate = matrix(4, 32).view(2, 2, 32), matrix(1, 16, 5)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for given in (None, gate):
            found, wanted = switched(x, given), plain(x, given)
            assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
            assert (found - wanted).float().norm() < 0.06 * wanted.float().norm()


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "usable"),
    [
        ("cpu", (9, 0), torch.bfloat16, False),
        ("cuda", (8, 0), torch.bfloat16, False),
        ("cuda", (8, 9), torch.bfloat16, True),
        ("cuda", (9, 0), torch.float32, False),
    ],
)
def test_where_it_runs(device, capability, dtype, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert (fp8_unusable_because(torch.device(device), dtype) is None) == usable


@pytest.mark.parametrize("keys", [{"width": 24, "heads": 3}, {"heads": 4, "head_width": 6}], ids=str)
def test_widths_without_a_kernel_are_refused(keys):
    config = DiTConfig(**{"width": 32, **keys}, matmul_precision="fp8")
    with pytest.raises(UserError, match=r"model\.matmul_precision=fp8"):
        config.validate()
