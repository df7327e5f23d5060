"""Batch normalisation whose statistics are those of the whole batch, over all processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Each holds a part of the loss, so gradients are
    summed, too."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def _total(local: Tensor) -> Tensor:
    total = _SumOverProcesses.apply(local)
    assert isinstance(total, Tensor)
    return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that gives on any number of processes what it gives on one.

    torch's SyncBatchNorm does so on GPUs only. Parameters, buffers and their names are those of
    nn.BatchNorm2d, so that weights go either way.

    Source: Ioffe and Szegedy, arXiv:1502.03167; statistics over all devices: ours, as torch's.
    """

    tracks = True
    """Whether a pass in training mode moves the running statistics; see `no_tracking`."""

    is_frozen = False
    """Whether it normalises by the running statistics in training mode, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises [b, c, h, w] per channel; processes may hold different numbers of rows."""
        if not self.training:
            return super().forward(input)
        if self.is_frozen:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            if self.tracks:
                return super().forward(input)
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        x = input.float()
        n_local = x.new_tensor([x.numel() / self.num_features])
        totals = _total(torch.cat([x.sum((0, 2, 3)), n_local]))
        n = totals[-1]
        mean = totals[:-1] / n
        centred = x - mean.view(1, -1, 1, 1)
        # The deviation from the mean of all, in a second round: x^2 - mean^2 would cancel.
        var = _total(centred.square().sum((0, 2, 3))) / n
        if self.tracks:
            self._track(mean.detach(), var.detach() * n / (n - 1))
        scale = self.weight * (var + self.eps).rsqrt()
        out = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return out.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)


def globalise_batch_norm(module: nn.Module) -> None:
    """Replaces every nn.BatchNorm2d of a module by one that looks at all processes."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            ours = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
            ours.load_state_dict(child.state_dict())
            setattr(module, name, ours)
        else:
            globalise_batch_norm(child)


@contextmanager
def no_tracking(module: nn.Module) -> Iterator[None]:
    """Within it, the running statistics of a module's batch norms stay as they are.

    For a second pass over the same images with parts of them masked: what is scored later is whole.
    """
    layers = [m for m in module.modules() if isinstance(m, GlobalBatchNorm2d)]
    for layer in layers:
        layer.tracks = False
    try:
        yield
    finally:
        for layer in layers:
            layer.tracks = True
