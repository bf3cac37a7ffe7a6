"""Messages around a ring of ranks, which travel while the ranks compute."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Passing:
    """A tensor on its way to the next rank, and that of the previous rank on its way here."""

    sent: Tensor
    """Kept until it has arrived, and must not change until then."""
    received: Tensor
    works: Sequence[dist.Work]

    def wait(self) -> Tensor:
        """Return the tensor of the previous rank, once both have arrived; on a GPU only the stream waits."""
        for work in self.works:
            work.wait()
        return self.received


def pass_on(x: Tensor, group: ProcessGroup) -> Passing:
    """Start to send x, contiguous, to the next rank of the group, and to receive the same shape from the previous."""
    received = torch.empty_like(x)
    rank, size = group.rank(), group.size()
    operations = [
        dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size),
        dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
    ]
    return Passing(x, received, dist.batch_isend_irecv(operations))
