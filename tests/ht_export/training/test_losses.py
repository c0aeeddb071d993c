import pytest
import torch
from torch.nn.functional import kl_div, one_hot

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts
from ht_export.training import losses
from ht_export.training.losses import Objective, draft_losses
from runtime.errors import InputError


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize(
    ("temperature", "top_k", "choice"), [(1.0, 0, 0.0), (2.0, 0, 0.0), (1.0, 5, 0.0), (1.0, 0, 0.5), (1.0, 0, 1.0)]
)
def test_losses_and_gradient_are_those_of_torch(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float, top_k: int, choice: float
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    parts = decoder_parts(base.model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 32, generator=generator)
    drafts = torch.randn(7, 2, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 9, (7, 2), generator=generator)
    shifts = torch.randn(7, 2, 32, generator=generator, requires_grad=True)
    weights = (1.0, 0.5)
    objective = Objective(weights, temperature, top_k, choice)
    found = draft_losses(parts, drafts.detach(), states, targets, objective, shifts.detach())

    wanted = parts.head(parts.norm(states)) / temperature
    if top_k:
        wanted = wanted.masked_fill(wanted < wanted.topk(top_k).values[:, -1:], -torch.inf)
    mixed = (1 - choice) * wanted.softmax(-1) + choice * one_hot(wanted.argmax(-1), wanted.shape[-1])
    logs = (parts.head(parts.norm(drafts) + shifts) / temperature).log_softmax(-1)
    by_step = torch.stack([kl_div(logs[:, k], mixed[targets[:, k]], reduction="batchmean") for k in range(2)])
    (by_step * torch.tensor(weights)).sum().mul(temperature**2).backward()
    torch.testing.assert_close(found.by_step, by_step.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradient, drafts.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.shift_gradient, shifts.grad, rtol=1e-4, atol=1e-6)
    unshifted = draft_losses(parts, drafts.detach(), states, targets, objective)
    assert unshifted.shift_gradient is None
    assert not torch.allclose(unshifted.by_step, found.by_step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1.0, -1.0),), "step weights must be at least 0"),
        (((0.0, 0.0),), "step weights must be at least 0"),
        (((1.0,), 0.0), "temperature must be above 0"),
        (((1.0,), 1.0, -1), "top_k must be at least 0"),
        (((1.0,), 1.0, 0, 1.5), "the choice's share of the loss must be from 0 to 1, not 1.5"),
    ],
)
def test_an_objective_that_makes_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(*arguments)
