"""What processes of tests run. Each of several: twenty steps of pretraining, copies of the weights on each; two steps
with the weights in shards, written as a sharded checkpoint; a router whose load both share. One alone: it is killed.
"""

import os
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastff.models import UltraFastBertForMaskedLM
from fastff.routers import FlatRouter
from fastff.train.pretrain import pretrain
from model_cases import small_batch, small_config
from training_cases import small


def two_steps(model, optimizer, rank=0, processes=1):
    """Losses of two steps on this process's part of each of two batches, rows shared out evenly."""
    losses = []
    for seed in range(2):
        rows = small_batch(seed)[0]
        rows = torch.cat((rows, rows.flip(1)))[rank::processes].contiguous()
        loss = model(rows, labels=rows).loss  # as many labels on each process: the mean of means is the mean
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def make(seed=0):
    torch.manual_seed(seed)
    model = UltraFastBertForMaskedLM(small_config())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def sharded_steps(out: Path) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, _ = make()
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = torch.tensor(two_steps(model, optimizer, rank, processes))
    dist.all_reduce(losses)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out / "fsdp")
    if rank == 0:
        torch.save(losses / processes, out / "fsdp-losses.pt")


def make_router():
    """A router, and rows for it."""
    torch.manual_seed(0)
    return FlatRouter(8, 12, 3), torch.randn(64, 8)


def member(rank: int, processes: int, port: int, out: Path, text: Path) -> None:
    """One of the processes, told what torchrun tells its own."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    pretrain(small(out / "run", text, steps=20, batch=8, save_every=100))
    sharded_steps(out)
    router, x = make_router()
    router(x.chunk(processes)[rank])
    torch.save(router.balance, out / f"balance-{rank}.pt")
    dist.barrier()
    # On a busy machine a process that takes the group apart is aborted by torch's own threads, about one time in ten:
    # everything is written by now.
    os._exit(0)


def killed_after(step: int, threads: int, out: Path, text: Path) -> None:
    """Pretraining whose process the system kills after a step."""

    def progress(stage: str, done: float, total: float | None = None, note: str = "") -> None:
        if note.startswith(f"step {step},"):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(threads)
    pretrain(small(out, text), progress=progress)
