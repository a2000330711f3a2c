"""What is recorded computes what is not: here "recorded" work is run again as it is; on a GPU it is a graph."""

import pytest
import torch
from torch import nn

from fastff.train.recorded import WARMUP_CALLS, RecordedStep, on_gpu

ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


def batches(device):
    """Steps of two micro-batches; a smaller one comes now and then, as the first or the second of a step."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(4, 4)] * 3 + [(2, 4), (4, 2), (4, 4), (3, 3), (4, 4)]
    return [[torch.randn(rows, 6, generator=generator).to(device) for rows in step] for step in sizes]


def trained(device, *, recorded, to_none):
    """Losses and weights after training; and how often the work itself was run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1)).to(device)
    unused = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([*model.parameters(), unused], lr=0.1, weight_decay=0.5)
    runs = []

    def run(batch, count):
        runs.append(len(batch["rows"]))
        loss = model(batch["rows"]).square().sum() / count
        loss.backward()
        return loss.detach()

    record = on_gpu if device == "cuda" else lambda work: work
    step = RecordedStep(run, [*model.parameters(), unused], 4, record) if recorded else run
    losses = []
    for micro_batches in batches(device):
        optimizer.zero_grad(set_to_none=to_none)
        for rows in micro_batches:
            losses.append(step({"rows": rows}, torch.tensor(float(len(rows)), device=device)))
        optimizer.step()
    return torch.stack(losses), [*model.parameters(), unused], runs


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_losses_and_weights_are_those_of_ordinary_training(device, to_none):
    losses, weights, _ = trained(device, recorded=False, to_none=to_none)
    got, made, runs = trained(device, recorded=True, to_none=to_none)
    torch.testing.assert_close(got, losses, rtol=0, atol=1e-6)
    for one, other in zip(made, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    if device == "cuda":
        assert runs.count(4) == WARMUP_CALLS + 1, "the graph ran the rest"


def test_what_no_loss_depends_on_does_not_decay():
    _, weights, _ = trained("cpu", recorded=True, to_none=True)
    assert torch.equal(weights[-1], torch.ones(3))
