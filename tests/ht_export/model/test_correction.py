import numpy as np
import torch

from ht_export.model.checkpoint import load_base_model
from ht_export.model.correction import CorrectionNetwork, correction_tables
from ht_export.model.families import decoder_parts
from tests.conftest import random_transfer


def test_an_untrained_correction_changes_nothing() -> None:
    network = CorrectionNetwork(2, 8, 3)
    assert not network(1, torch.randn(5, 8)).any()


def test_the_tables_add_to_each_logit_what_the_network_does(tiny_checkpoint: str) -> None:
    base = load_base_model(str(tiny_checkpoint)).model
    network = random_transfer((2, 3), correction_rank=4).correction
    assert network is not None
    parts = decoder_parts(base)
    tables = correction_tables(base, network)
    tokens = np.arange(264)
    for step in range(2):
        for before in (3, 100):
            shift = network(step, parts.embed(torch.tensor(before)))
            expected = parts.head(shift).detach().numpy()
            found = tables.after(tables.rows(step, tokens), before)
            # Up to a constant, which no softmax sees.
            np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-4)
