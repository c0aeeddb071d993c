"""The starting point of transfer layers in closed form: ridge regression from a hidden state to a later one.

W_k is asked to turn the state of a token at layer t_k into the state that the token k positions further on has there,
as the base model itself will compute it. Least squares gives the best such map at once, without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ht_export.model.transfer import TransferLayers
from ht_export.training.drafts import Context
from runtime.errors import InputError

# Relative to the mean square of a feature.
DAMPING = 1e-4
# A text's first tokens serve as attention sinks, with states far larger than all others.
SKIPPED_TOKENS = 4


class RidgeRegression:
    """The normal equations of the steps from `first_step` (0-based) on, summed over texts; memory does not grow with
    their number.
    """

    def __init__(self, transfer: TransferLayers, first_step: int = 0) -> None:
        self.transfer = transfer
        self.steps = range(first_step, transfer.num_steps)
        inputs = transfer.hidden_size + 1
        layers = set(transfer.layers[first_step:])
        self.products = {layer: torch.zeros(inputs, inputs, dtype=torch.float64) for layer in layers}
        self.targets = {k: torch.zeros(inputs, transfer.hidden_size, dtype=torch.float64) for k in self.steps}
        self.count = 0

    def add(self, context: Context, lengths: Iterable[int]) -> None:
        """Take in the states of B texts of these lengths."""
        num_steps = self.transfer.num_steps
        for row, length in enumerate(lengths):
            used = length - SKIPPED_TOKENS - num_steps
            if used < 1:
                continue
            self.count += used
            for layer, product in self.products.items():
                states = context.hidden[layer][row, SKIPPED_TOKENS:length].float()
                features = _with_constant(states[:used])
                product += (features.T @ features).double().cpu()
                for k, target in self.targets.items():
                    if self.transfer.layers[k] == layer:
                        target += (features.T @ states[k + 1 : k + 1 + used]).double().cpu()

    def solve(self) -> None:
        """Set the transfer layers. Raises `InputError` when the texts were too few or too short."""
        inputs = len(next(iter(self.products.values())))
        if self.count < inputs:
            otherwise = "" if self.steps.start else ", or start from the identity (ht-train fit --init identity)"
            raise InputError(
                f"the data has {self.count} positions for the initial regression of {inputs} unknowns; answer more "
                f"prompts, or at greater length (--max-new-tokens){otherwise}"
            )
        for k in self.steps:
            product = self.products[self.transfer.layers[k]]
            damping = DAMPING * product.diagonal()[:-1].mean()
            solution = torch.linalg.solve(product + damping * torch.eye(inputs, dtype=torch.float64), self.targets[k])
            self.transfer.set_affine(k, solution[:-1].T.float(), solution[-1].float())


def _with_constant(states: Tensor) -> Tensor:
    return torch.cat([states, states.new_ones(len(states), 1)], dim=1)
