"""Scoring next tokens: chunk by chunk it is the log-softmax written out, in values and in gradients."""

import math

import pytest
import torch

from hf_fedsa.client import scoring
from hf_fedsa.client.scoring import score_next_tokens

ROWS, LENGTH, VOCABULARY = 3, 6, 11


def make_batch(dtype=torch.float32, scale: float = 3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, :3], labels[2, 4:] = -100, -100
    labels[1, 2] = logits[1, 1].argmax()
    return logits, labels


def written_out(logits, labels):
    """In fp64, one token after the other."""
    log_probs, entropy, is_top1 = (torch.zeros(ROWS, LENGTH - 1, dtype=torch.float64) for _ in range(3))
    for row in range(ROWS):
        for place in range(LENGTH - 1):
            if (label := labels[row, place + 1]) != -100:
                scored = logits[row, place].double().log_softmax(-1)
                log_probs[row, place] = scored[label]
                entropy[row, place] = -sum(p.exp() * p for p in scored)
                is_top1[row, place] = scored.argmax() == label
    return log_probs, entropy, is_top1.bool()


# One token at a time, two with one left over, and all at once.
@pytest.mark.parametrize("chunk_numel", [1, 2 * VOCABULARY, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_log_softmax(monkeypatch, chunk_numel, dtype):
    monkeypatch.setattr(scoring, "CHUNK_NUMEL", chunk_numel)
    logits, labels = make_batch(dtype)
    given = logits.clone()
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_probs, entropy, is_top1, mask = score_next_tokens(ours, labels)
    expected = written_out(plain, labels)

    assert torch.equal(mask, labels[:, 1:] != -100)
    assert log_probs.dtype == torch.float32 and log_probs.shape == (ROWS, LENGTH - 1)
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=1e-5)
    assert torch.equal(is_top1, expected[2]) and is_top1.any() and not is_top1.all()
    assert not entropy.requires_grad

    weights = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(1))
    (log_probs * weights).sum().backward()
    (expected[0] * weights).sum().backward()
    assert ours.grad.dtype == dtype
    tolerance = {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    torch.testing.assert_close(ours.grad.double(), plain.grad, **tolerance)
    assert not ours.grad[:, -1].any() and not ours.grad[0, :2].any(), "tokens without a label have a gradient"
    assert torch.equal(ours.detach(), given), "the logits were written to"


def test_logits_far_from_zero_lose_nothing():
    logits, labels = make_batch()
    near, far = score_next_tokens(logits, labels), score_next_tokens(logits + 1024, labels)
    torch.testing.assert_close(near[0], far[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(near[1], far[1], rtol=0, atol=1e-3)
    extreme = torch.full((1, 2, VOCABULARY), -1e4)
    extreme[..., 3] = 1e4
    log_probs, entropy, is_top1, _ = score_next_tokens(extreme, torch.tensor([[0, 3]]))
    assert (log_probs.item(), entropy.item(), is_top1.item()) == (0.0, 0.0, True)


def test_equal_logits_have_the_entropy_of_the_whole_vocabulary():
    labels = torch.zeros(1, 2, dtype=torch.long)
    log_probs, entropy, _, _ = score_next_tokens(torch.zeros(1, 2, VOCABULARY), labels)
    assert entropy.item() == pytest.approx(math.log(VOCABULARY))
    assert log_probs.item() == pytest.approx(-math.log(VOCABULARY))


def test_a_batch_without_a_label_has_no_scores_and_no_gradient():
    logits, labels = make_batch()
    logits.requires_grad_()
    log_probs, entropy, is_top1, mask = score_next_tokens(logits, torch.full_like(labels, -100))
    log_probs.sum().backward()
    assert not any(values.any() for values in (log_probs, entropy, is_top1, mask, logits.grad))


def test_what_is_not_a_number_stays_with_its_token():
    logits, labels = make_batch()
    logits[1, 0, 4] = math.nan
    logits.requires_grad_()
    log_probs, *_ = score_next_tokens(logits, labels)
    assert log_probs.isnan().nonzero().tolist() == [[1, 0]]
    log_probs.sum().backward()
    assert logits.grad.isnan().any(-1).nonzero().tolist() == [[1, 0]]
