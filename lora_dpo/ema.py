"""The exponential moving average of the adapter's weights: smoother than the last ones, at no cost in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """mean ← decay · mean + (1 − decay) · weights after every optimizer step, in float32, from the first weights on.

    Early on the decay is held at (1 + n) / (10 + n) after n steps, so that a short run is not all start.

    Args:
        parameters: the trained weights, by name.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = dict(parameters), decay
        self._mean = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer's step number `step` (1-based)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self._mean[name].lerp_(parameter, 1 - decay)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved mean in; KeyError if a weight is missing."""
        for name, mean in self._mean.items():
            mean.copy_(state[name])

    @torch.no_grad()
    def put_in(self) -> None:
        """The mean in the weights' place, for good."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._mean[name])

    @contextmanager
    def used(self) -> Iterator[None]:
        """Scope with the mean in the weights' place; afterwards they are as they were, bit for bit."""
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.put_in()
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(before[name])
