import torch

from ht_export.training.batches import BatchSampler, make_batch
from ht_export.training.data import AnsweredPrompt


def test_every_anchors_drafts_have_labels_in_the_answer() -> None:
    sequences = [AnsweredPrompt("0", "", [5, 6, 7], [8, 9, 10, 11, 12]), AnsweredPrompt("1", "", [5], [6, 7, 8, 9])]
    batch = make_batch(sequences, 2, None, None)
    assert batch.anchors.tolist() == [[2, 3, 4], [0, 1, 0]]
    assert batch.weights.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 0, 0, 0]]


def test_a_pass_over_the_data_takes_each_text_once_and_batches_depend_on_the_step_alone() -> None:
    sequences = [AnsweredPrompt(str(i), "", [i + 10] * (1 + i % 5), [5] * (8 + i)) for i in range(20)]
    sampler = BatchSampler(sequences, 4, 3, 2, seed=0)
    first_tokens = [token for step in range(5) for token in sampler.batch(step).input_ids[:, 0].tolist()]
    assert sorted(first_tokens) == list(range(10, 30))
    again = BatchSampler(sequences, 4, 3, 2, seed=0).batch(7)
    assert torch.equal(again.anchors, sampler.batch(7).anchors)
    assert not torch.equal(sampler.batch(0).input_ids[:, 0], sampler.batch(5).input_ids[:, 0])
