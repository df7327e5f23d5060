"""An average of the weights over the steps, which often scores better than the last of them."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """The exponential moving average of a model's weights.

    Attributes:
        source: The model that trains.
        module: The same with the averaged weights; buffers, such as statistics of batch norm, are
            the newest of the source.

    Source: Polyak averaging, as in MaskCLIP (arXiv:2208.12262).
    """

    def __init__(self, source: nn.Module, decay: float, device: torch.device) -> None:
        """Begins with the weights as they are.

        Args:
            source: Not wrapped, and not compiled yet.
            decay: Share of the average that stays in each step.
            device: Where the source trains.
        """
        self.source = source
        self._averaged = AveragedModel(source, device, multi_avg_fn=get_ema_multi_avg_fn(decay))
        # A counter on a GPU would be waited for in every step.
        self._averaged.n_averaged = torch.ones((), dtype=torch.long)
        self.module: nn.Module = self._averaged.module.eval()

    def update(self) -> None:
        """Takes up the weights after a step."""
        self._averaged.update_parameters(self.source)
