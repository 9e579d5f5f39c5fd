"""Log-probability, entropy and rank of next tokens from logits, in chunks that stay in the cache."""

import torch
from torch.autograd.function import once_differentiable

# Logits worked on at a time: 4 MB in fp32, of which three copies fit the last-level cache of a small server. From an
# eighth of it to twice as much made no difference that could be measured.
CHUNK_NUMEL = 2**20


def score_next_tokens(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Scores the label that follows each token, in fp32 whatever the dtype of the logits.

    A softmax over a whole batch is written to memory, read for the loss, and read again for the entropy; at 49,152
    entries per token that is a noticeable part of a step on the CPU. Here a few tokens at a time are taken through all
    of it, and the backward pass computes the softmax anew.

    Args:
        logits (`torch.Tensor` of shape `(rows, seq_len, vocabulary)`):
            The model's output.
        labels (`torch.Tensor` of shape `(rows, seq_len)`):
            Token ids, and -100 where there is nothing to learn.

    Returns:
        Log-probability of the next label (differentiable), entropy in nats of the distribution over next labels,
        whether no other label is more likely, and whether there is a label at all; each of shape
        `(rows, seq_len - 1)`, and zero or false where there is none.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # (rows, seq_len)
    scores = _ScoreNextTokens.apply(logits, following)
    log_probs, entropy, is_top1 = (values[:, :-1] for values in scores)
    return log_probs, entropy, is_top1, labels[:, 1:] != -100


class _ScoreNextTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor):
        flat, labels = logits.reshape(-1, logits.shape[-1]), labels.flatten()
        places = (labels != -100).nonzero().squeeze(1)
        log_probs = flat.new_zeros(len(flat), dtype=torch.float32)
        entropy, log_norms = torch.zeros_like(log_probs), torch.zeros_like(log_probs)
        is_top1 = torch.zeros_like(log_probs, dtype=torch.bool)
        for at in _chunks(places, flat.shape[-1]):
            values = flat[at].float()
            largest = values.amax(-1, keepdim=True)
            values -= largest
            of_label = values.gather(-1, labels[at, None]).squeeze(-1)
            exp = values.exp()
            norm = exp.sum(-1)
            log_norm = norm.log()
            log_probs[at] = of_label - log_norm
            entropy[at] = log_norm - exp.mul_(values).sum(-1) / norm
            is_top1[at] = of_label == 0
            log_norms[at] = largest.squeeze(-1) + log_norm
        ctx.save_for_backward(logits, labels, places, log_norms)
        log_probs, entropy, is_top1 = (values.view(logits.shape[:-1]) for values in (log_probs, entropy, is_top1))
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, *_):
        logits, labels, places, log_norms = ctx.saved_tensors
        flat, grad = logits.reshape(-1, logits.shape[-1]), grad.flatten().float()
        result = torch.empty_like(flat)
        result[labels == -100] = 0
        for at in _chunks(places, flat.shape[-1]):
            values = flat[at].float().sub_(log_norms[at, None]).exp_().mul_(-grad[at, None])  # -grad * softmax
            values.scatter_add_(-1, labels[at, None], grad[at, None])
            result.index_copy_(0, at, values.to(result.dtype))
        return result.view_as(logits), None


def _chunks(places: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, ...]:
    return places.split(max(1, CHUNK_NUMEL // vocabulary))
