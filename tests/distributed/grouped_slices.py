"""Grouped attention over real ranks that share sequences, against one process; started by torchrun, rank 0 prints."""

import json

import torch
import torch.distributed as dist

from scmdm.distributed.context_parallel import make_context
from scmdm.models import attention
from scmdm.models.attention import attend, attend_slices, exchanged_kv_heads

LENGTH, WIDTH = 24, 8
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (28, 4)]


def largest_difference(heads, kv_heads, context, sent):
    """Between a rank's slices and those of whole sequences, of results and of all gradients."""
    generator = torch.Generator().manual_seed(heads + kv_heads)
    numbers = (heads, kv_heads, kv_heads)
    whole = [torch.randn(2, LENGTH, n, WIDTH, generator=generator).requires_grad_() for n in numbers]
    weight = torch.randn(2, LENGTH, heads, WIDTH, generator=generator)
    times = heads // kv_heads
    q, k, v = whole
    expected = attend(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2), "sdpa")
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), whole)]

    def own(x):
        return x.detach().chunk(context.size(), 1)[context.get_local_rank()]

    parts = [own(x).clone().requires_grad_() for x in whole]
    sent.clear()
    out = attend_slices(*parts, "sdpa", context)
    found = [out, *torch.autograd.grad((out * own(weight)).sum(), parts)]
    return max(float((one - own(other)).abs().max()) for one, other in zip(found, wanted, strict=True))


def main():
    dist.init_process_group("gloo")
    ranks, sent, exchange = dist.get_world_size(), [], attention._exchange
    context = make_context(ranks, torch.device("cpu"))

    def watched(x, *others):
        sent.append(x.nbytes)
        return exchange(x, *others)

    attention._exchange = watched
    rows = []
    for heads, kv_heads in HEADS:
        difference = torch.tensor(largest_difference(heads, kv_heads, context, sent))
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        position = 2 * LENGTH // ranks * WIDTH * 4
        head_counts = [size // position for size in sent]
        wanted = [heads + 2 * exchanged_kv_heads(heads, kv_heads, ranks), heads]
        rows.append(
            {"heads": heads, "kv": kv_heads, "difference": float(difference), "sent": head_counts, "wanted": wanted}
        )
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(rows))
    dist.barrier()  # a rank that leaves early would close the connection of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
