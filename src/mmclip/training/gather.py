"""The rows of all processes in each of them, with gradients that find their way back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        padded = local.new_zeros((max(sizes), *local.shape[1:]))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Each process holds a part of the loss: a row's gradient is the sum over all of them.
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        start = sum(ctx.sizes[: ctx.rank])
        return grad[start : start + ctx.sizes[ctx.rank]], None, None


def all_gather_rows(local: Tensor) -> Tensor:
    """The rows [b, ...] of all processes, in the order of their ranks, with gradients to each.

    Processes may hold different numbers of rows. With one process, the input itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    size = torch.tensor([len(local)], device=local.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    numbers = [int(s) for s in sizes]
    gathered = _AllGatherRows.apply(local.contiguous(), numbers, dist.get_rank())
    assert isinstance(gathered, Tensor)
    return gathered
