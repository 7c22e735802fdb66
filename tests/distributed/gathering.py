"""Values of all ranks on every rank, for tests: scmdm itself gathers on rank 0 alone."""

import torch.distributed as dist


def all_gather_object(value):
    """Every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
