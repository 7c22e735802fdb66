"""Collectives of each training step of the command line: `torchrun ... -m tests.distributed.collectives OUT train ...`.

Each rank writes the numbers and bytes by operator and device type of the steps to `OUT.RANK`, as JSON.
"""

import json
import os
import sys
from collections import Counter
from contextlib import suppress

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scmdm.cli import main
from scmdm.training import trainer

_NAMESPACES = ("c10d", "_c10d_functional")
_NONE = ("wait_tensor", "_wrap_tensor_autograd", "monitored_barrier_")


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives of this process, as `CommDebugMode` does, and their bytes: the largest of its tensors."""

    def __init__(self):
        super().__init__()
        self.number, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its collectives are those of the tensors in it
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace in _NAMESPACES and name.partition(".")[0] not in _NONE:
            lists = [arg if isinstance(arg, (list, tuple)) else [arg] for arg in (*args, result)]
            sizes = [sum(t.nbytes for t in tree_leaves(part) if isinstance(t, Tensor)) for part in lists]
            self.number[name] += 1
            self.bytes[name] += max(sizes)
        return result

    def take(self):
        """Return what was counted since the last call."""
        found = {name: [self.number[name], self.bytes[name]] for name in sorted(self.number)}
        self.number.clear()
        self.bytes.clear()
        return found


def run(out, arguments):
    counter, steps, set_lr = CollectiveCounter(), [], trainer.set_lr

    def at_the_start_of_a_step(*given):
        steps.append(counter.take())
        return set_lr(*given)

    trainer.set_lr = at_the_start_of_a_step
    with counter, suppress(SystemExit):
        main(arguments)
    with open(f"{out}.{os.environ.get('RANK', '0')}", "w") as file:
        json.dump(steps[1:], file)  # without what precedes the first step


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
