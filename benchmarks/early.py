"""A pipeline stage that waits for one trip of a message where the library's own waits for two."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage


class EarlyStage(PipelineStage):
    """A stage that posts all receives of a step when the step begins.

    The schedules post a receive when they need its message, and gloo sends nothing before it knows
    of the receive: over a slow link every micro-batch then waits for two trips, which would flatter
    whatever it is compared with. Messages have tags, because they are not received in the order in
    which they were sent.
    """

    def clear_runtime_states(self) -> None:
        """A step begins; before the first, there are no buffers to receive into."""
        super().clear_runtime_states()
        self.posted: dict[tuple[bool, int], list[dist.Work | None]] = {}
        for forward, chunks, get in (
            (True, self.args_recv_info, self.get_fwd_recv_ops),
            (False, self.grad_recv_info, self.get_bwd_recv_ops),
        ):
            neighbour = self.stage_index - 1 if forward else self.stage_index + 1
            if not 0 <= neighbour < self.num_stages or self._is_same_rank(neighbour):
                continue
            for chunk in chunks:
                self.posted[forward, chunk] = [
                    dist.irecv(op.tensor, op.peer, op.group, op.tag) for op in get(chunk)
                ]

    def _tag(
        self, operations: list[dist.P2POp], to: int, forward: bool, chunk: int
    ) -> list[dist.P2POp]:
        for operation in operations:
            operation.tag = 2 * (chunk * self.num_stages + to) + forward
        return operations

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing, where it is posted."""
        if (True, fwd_chunk_id) in self.posted:
            return []
        return self._tag(
            super().get_fwd_recv_ops(fwd_chunk_id), self.stage_index, True, fwd_chunk_id
        )

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing, where it is posted."""
        if (False, bwd_chunk_id) in self.posted:
            return []
        return self._tag(
            super().get_bwd_recv_ops(bwd_chunk_id), self.stage_index, False, bwd_chunk_id
        )

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """With the tags that the receiver expects."""
        return self._tag(
            super().get_fwd_send_ops(fwd_chunk_id), self.stage_index + 1, True, fwd_chunk_id
        )

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """With the tags that the receiver expects."""
        return self._tag(
            super().get_bwd_send_ops(bwd_chunk_id), self.stage_index - 1, False, bwd_chunk_id
        )

    def _wait(self, forward: bool, chunk: int) -> None:
        for work in self.posted.get((forward, chunk), ()):
            if work is not None:
                work.wait()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """When its input has come."""
        self._wait(True, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """When its gradient has come."""
        self._wait(False, bwd_chunk_id)
        return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
