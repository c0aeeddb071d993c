"""Fitting foresight: what drafts and noise together say of the base model's draw, at some temperatures.

The weights of `runtime.drafting.foresight` make a logistic regression: among the candidates of a draft's shortlist, and
all other tokens as one more, which one wins the race? Races are drawn for the base model's own distributions at every
anchor of some texts, so that any text serves, greedy or sampled. Like a tree, a step's candidates are corrected for the
token before them, the text's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ht_export.model.checkpoint import BaseModel
from ht_export.model.correction import correction_tables
from ht_export.model.families import DecoderParts, decoder_parts
from ht_export.model.reference import draft_head, normed_drafts
from ht_export.model.transfer import TransferLayers
from ht_export.training.batches import make_batch
from ht_export.training.data import AnsweredPrompt
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.training.losses import CHUNK_ROWS
from runtime.drafting.correction import SHORTLIST, corrected
from runtime.drafting.drafts import DraftStep
from runtime.drafting.foresight import USUAL
from runtime.drafting.transfer_drafts import tempered

TEMPERATURES = (0.4, 0.7, 1.0)
# As many services sample. What the nucleus leaves out counts as what no draw wins.
TOP_P = 0.95
# Three numbers need no more.
MOST_ANCHORS = 6000
# The nucleus is looked for among so many tokens of a row; where these do not fill it, the row has none.
NUCLEUS_TOKENS = 512
ROUNDS = 60
# Pulls towards what is usual, per anchor: it only counts where there is next to no text.
PULL = 1e-4
LEAST = 1e-12


@dataclass(frozen=True)
class Races:
    """Draws of one draft step at one temperature: logs of the candidates' probabilities [A, N] and waits [A, N], of the
    probability of all others [A], and the `winner` [A], N where it is none of the candidates.
    """

    probabilities: Tensor
    waits: Tensor
    others: Tensor
    winner: Tensor

    def scores(self, numbers: Tensor) -> Tensor:
        """Return log weights [A, N + 1] for numbers [3]: power, trust and the log of `rest`."""
        candidates = numbers[0] * self.probabilities - numbers[1] * self.waits
        return torch.cat([candidates, (numbers[0] * self.others + numbers[2])[:, None]], dim=1)

    def loss(self, numbers: Tensor) -> Tensor:
        """Return the mean negative log of the winner's probability."""
        return torch.nn.functional.cross_entropy(self.scores(numbers), self.winner)


def fit_foresight(
    base: BaseModel,
    transfer: TransferLayers,
    data: Sequence[AnsweredPrompt],
    progress: Progress | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the foresight of `transfer`, fitted on `data`, as JSON values for `acceptance`.

    By temperature and draft step: `power`, `trust` and `rest`, and the `log_loss` that they have, in nats.
    """
    texts = _some(data)
    steps = transfer.num_steps
    drawn: list[list[list[Races]]] = [[[] for _ in range(steps)] for _ in temperatures]
    rng = np.random.default_rng([seed, 2])
    anchors = sum(len(text.answer) - steps for text in texts)
    bar = progress.add_task("foreseeing draws", total=anchors) if progress else None
    for drafts, logits in _shortlists(base, transfer, texts):
        for of_temperature, temperature in zip(drawn, temperatures, strict=True):
            for k in range(steps):
                of_temperature[k].append(_races([one[k] for one in drafts], logits[:, k], temperature, rng))
        if progress and bar is not None:
            progress.advance(bar, len(drafts))
    return [
        {
            "temperature": temperature,
            "steps": [_fitted(k, of_step) for k, of_step in enumerate(of_temperature)],
        }
        for temperature, of_temperature in zip(temperatures, drawn, strict=True)
    ]


def _some(data: Sequence[AnsweredPrompt]) -> Sequence[AnsweredPrompt]:
    """Return texts, evenly from first to last, with about as many anchors as are of use."""
    anchors = sum(len(text.answer) for text in data)
    return data[:: max(1, math.ceil(anchors / MOST_ANCHORS))]


@torch.inference_mode()
def _shortlists(
    base: BaseModel, transfer: TransferLayers, texts: Sequence[AnsweredPrompt]
) -> Iterator[tuple[list[list[DraftStep]], Tensor]]:
    """Yield for the anchors of each text, up to `CHUNK_ROWS` at a time, the corrected shortlists of every step, and the
    base model's logits [A, K, V] of what they stand for: those of a whole text would be too large.
    """
    parts = decoder_parts(base.model)
    correction = None
    if transfer.correction:
        correction = correction_tables(base.model, transfer.correction, transfer.draft_tokens)
    read_by = draft_head(base.model, transfer)
    head = parts.head if read_by is None else read_by
    for text in texts:
        batch = make_batch([text], transfer.num_steps, None, None).to(base.model.device)
        context = run_context(base.model, transfer.layers, batch.input_ids)
        hidden = draft_hidden(base.model, transfer, context, batch.anchors)[0]
        normed = normed_drafts(base.model, transfer, hidden)
        states = context.hidden[len(parts.layers)][0]
        ids = np.array(text.tokens)
        for anchors, of_drafts in zip(batch.anchors[0].split(CHUNK_ROWS), normed.split(CHUNK_ROWS), strict=True):
            best = head(of_drafts).float().softmax(-1)
            best = best.topk(min(SHORTLIST, best.shape[-1]), dim=-1)
            tokens = best.indices if read_by is None else read_by.tokens[best.indices]
            found, shares = tokens.cpu().numpy(), best.values.double().cpu().numpy()
            drafts = []
            for row, anchor in enumerate(anchors.tolist()):
                steps = [DraftStep(*step) for step in zip(found[row], shares[row], strict=True)]
                after = corrected(steps, correction, found.shape[-1])
                drafts.append([after.after(k, int(ids[anchor + 1 + k])) for k in range(len(steps))])
            rows = anchors[:, None] + torch.arange(1, transfer.num_steps + 1, device=states.device)
            yield drafts, _logits(parts, states, rows)


def _logits(parts: DecoderParts, states: Tensor, rows: Tensor) -> Tensor:
    """Return the base model's logits [A, K, V] of states [N, d] at `rows` [A, K], on the CPU."""
    first = int(rows.min())
    logits = parts.capped(parts.head(parts.norm(states[first : int(rows.max()) + 1]))).float().cpu()
    return logits[rows.cpu() - first]


def _races(drafts: Sequence[DraftStep], logits: Tensor, temperature: float, rng: np.random.Generator) -> Races:
    """Draw a race at each of A anchors, with `drafts` of A shortlists and the base model's logits [A, V]."""
    at = [tempered(step, temperature) for step in drafts]
    tokens = torch.from_numpy(np.stack([step.tokens for step in at]))
    drafted = torch.from_numpy(np.stack([step.probabilities for step in at]))
    probabilities = _nucleus(logits.double(), temperature).gather(1, tokens)
    rest = (1 - probabilities.sum(-1)).clamp(min=0)
    waits = torch.from_numpy(rng.exponential(size=(len(at), tokens.shape[1] + 1)))
    finished = waits / torch.cat([probabilities, rest[:, None]], dim=1)
    return Races(
        drafted.clamp(min=LEAST).log(),
        waits[:, :-1].clamp(min=LEAST).log(),
        (1 - drafted.sum(-1)).clamp(min=LEAST).log(),
        finished.argmin(-1),
    )


def _nucleus(logits: Tensor, temperature: float) -> Tensor:
    """Return probabilities [A, V] at `temperature` and `TOP_P`."""
    probabilities = (logits / temperature).softmax(-1)
    best = probabilities.topk(min(NUCLEUS_TOKENS, logits.shape[-1]), dim=-1).values
    before = best.cumsum(-1) - best
    least = torch.where(before < TOP_P, best, 1.0).min(-1, keepdim=True).values
    whole = best.sum(-1, keepdim=True) >= TOP_P
    kept = torch.where(~whole | (probabilities >= least), probabilities, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _fitted(step: int, drawn: Sequence[Races]) -> dict[str, float]:
    """Return the numbers of one step with the least loss."""
    races = Races(*(torch.cat([getattr(one, name) for one in drawn]) for name in Races.__dataclass_fields__))
    usual = USUAL[min(step, len(USUAL) - 1)]
    start = torch.tensor([usual.power, usual.trust, math.log(usual.rest)], dtype=torch.float64)
    numbers = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([numbers], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = races.loss(numbers) + PULL * (numbers - start).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    power, trust, rest = numbers.detach().tolist()
    loss = float(races.loss(numbers.detach()))
    return {
        "power": round(min(max(power, 0.0), 10.0), 4),
        "trust": round(min(max(trust, 0.0), 10.0), 4),
        "rest": round(min(math.exp(min(rest, 20.0)), 1e8), 4),
        "log_loss": round(loss, 4),
    }
