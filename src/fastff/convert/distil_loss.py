"""What a student's output is worth beside its teacher's: the losses of the joint distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastff.models.kinds import Kind

VALUES_AT_ONCE = 2**26  # of the divergence, in float32


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over unpadded positions: hidden (examples, seq_len, width), mask (examples, seq_len), None: all are."""
    if mask is None:
        return hidden.mean(1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def distillation_loss(
    student: Any,
    teacher: Any,
    inputs: dict[str, Tensor],
    kind: Kind,
    *,
    hidden_states: bool = True,
    padded: bool = True,
) -> Tensor:
    """`end_loss`, and with hidden_states, too, those of every block, each dimension by its own variance.

    padded=False: no example is, so a GPU need not count how many tokens are real."""
    wanted = hidden_states or kind == "embedding"
    with torch.no_grad():
        target = teacher(**inputs, output_hidden_states=wanted)
    got = student(**inputs, output_hidden_states=wanted)
    mask = inputs.get("attention_mask")
    end = end_loss(got, target, mask, kind, padded=padded)
    return end + hidden_loss(got, target, mask if padded else None) if hidden_states else end


def real_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Of values (examples, length, ...) the rows that mask (examples, length) keeps, or all, without one."""
    return values.flatten(0, 1) if mask is None else values[mask.bool()]


def hidden_loss(got: Any, target: Any, mask: Tensor | None) -> Tensor:
    """Mean over blocks of how far hidden states are, each dimension by its own variance; mask (examples, length)."""
    hidden = []
    for h, t in zip(got.hidden_states[1:], target.hidden_states[1:], strict=True):
        h, t = real_tokens(h, mask).float(), real_tokens(t, mask).float()
        hidden.append(((h - t).square() / t.var(0).clamp(min=1e-6)).mean())
    return torch.stack(hidden).mean()


def end_loss(got: Any, target: Any, mask: Tensor | None, kind: Kind, *, padded: bool = True) -> Tensor:
    """What the model is used for: cosine and in-batch similarity of mean-pooled embeddings or of a picture's features,
    or the divergence from the teacher's distribution over tokens or classes. got, target: outputs with hidden states;
    mask (examples, seq_len), None where nothing is padded."""
    if kind in ("embedding", "image"):
        a, b = (F.normalize(features.float(), dim=-1) for features in _pooled(got, target, mask, kind))
        return 10 * (1 - (a * b).sum(-1)).mean() + 100 * (a @ a.t() - b @ b.t()).square().mean()
    logits, wanted = got.logits, target.logits
    if kind != "classifier":
        real = mask if padded else None
        logits, wanted = real_tokens(logits, real), real_tokens(wanted, real)
    loss: Tensor = Divergence.apply(logits, wanted)  # type: ignore[no-untyped-call]
    return loss


def _pooled(got: Any, target: Any, mask: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
    """Features (examples, width) of a student and its teacher."""
    if kind == "image":
        pooler = has_pooler(target)
        return picture_features(got, pooler=pooler), picture_features(target, pooler=pooler)
    return mean_pool(got.hidden_states[-1].float(), mask), mean_pool(target.hidden_states[-1].float(), mask)


def has_pooler(output: Any) -> bool:
    """Whether an image model gives features of whole pictures of its own."""
    return getattr(output, "pooler_output", None) is not None


def picture_features(output: Any, *, pooler: bool) -> Tensor:
    """Features (pictures, width) of whole pictures: those that the model gives, or the mean over its patches."""
    features: Tensor = output.pooler_output if pooler else output.last_hidden_state.mean(1)
    return features


def divergence_sum(values: Tensor, target: Tensor, grad: Tensor, count: int) -> Tensor:
    """Sum over rows of the divergence of softmax(values) from softmax(target), all (rows, classes); grad becomes its
    gradient by `values`, divided by `count`."""
    log_p, log_q = F.log_softmax(target.float(), -1), F.log_softmax(values.float(), -1)
    p = log_p.exp()
    grad.copy_((log_q.exp() - p) / count)
    return torch.sum(p * (log_p - log_q))


class Divergence(torch.autograd.Function):
    """Mean over rows of the divergence of softmax(logits) from softmax(wanted); both (rows, classes). Its gradient is
    that of `logits` alone.

    The gradient is made at once, piece by piece: of a decoder's many words nothing else is kept in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        grad = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, VALUES_AT_ONCE // logits.shape[1])
        for values, target, out in zip(logits.split(rows), wanted.split(rows), grad.split(rows), strict=True):
            total += divergence_sum(values, target, out, len(logits))
        ctx.save_for_backward(grad)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, share: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * share, None
