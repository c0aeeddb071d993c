"""The trace of `transformers`: its cache is filled, by whichever name a release knows it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from ht_export.verify.traces import transformers_trace
from tests.conftest import tiny_llama


class Older(nn.Module):
    """A model of a release that knows the cache by its older name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool | None = None) -> Any:
        return self.model(input_ids, cache=past_key_values, use_cache=use_cache)


@pytest.mark.parametrize("older", [False, True])
def test_the_cache_is_filled_and_no_release_warns(older: bool) -> None:
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = transformers_trace(Older(model) if older else model, [1, 5, 9])
    assert len(found.outputs.key_new) == model.config.num_hidden_layers
    assert all(rows.shape[-2] == 3 and np.abs(rows).max() > 0 for rows in found.outputs.key_new)
