"""Host buffers of asynchronous saves."""

import pytest
import torch

from scmdm.checkpoint.staging import HostBuffers


def test_buffers_are_reused_and_hold_the_values_of_their_save():
    buffers, tensors = HostBuffers(), {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    first = buffers.stage(tensors)
    first.wait()
    places = {name: value.data_ptr() for name, value in first.values.items()}
    assert all(places[name] != tensor.data_ptr() for name, tensor in tensors.items())
    for tensor in tensors.values():
        tensor.fill_(2)
    assert all((value == 1).all() and value.dtype == tensors[name].dtype for name, value in first.values.items())
    second = buffers.stage(tensors)
    assert {name: value.data_ptr() for name, value in second.values.items()} == places
    assert all((value == 2).all() for value in second.values.values())


def test_a_tensor_of_another_shape_gets_another_buffer():
    buffers = HostBuffers()
    buffers.stage({"a": torch.ones(3)})
    assert buffers.stage({"a": torch.ones(7)}).values["a"].shape == (7,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_from_a_gpu_are_page_locked_and_complete_before_later_kernels_change_the_tensor():
    buffers, tensor = HostBuffers(), torch.ones(2**24, device="cuda")
    places = set()
    for value in range(5):
        tensor.fill_(value)
        staged = buffers.stage({"a": tensor})
        tensor.fill_(-1)
        staged.wait()
        assert staged.values["a"].is_pinned() and (staged.values["a"] == value).all()
        places.add(staged.values["a"].data_ptr())
    assert len(places) == 1
