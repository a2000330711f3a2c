"""One of the two processes of the test of balance: `balance_case.py RENDEZVOUS RANK OUT`."""

import os
import sys

import torch
import torch.distributed as dist

from conftest import make_rows
from fastff.routers import FlatRouter

if __name__ == "__main__":
    rendezvous, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(0)
    router = FlatRouter(8, 12, 3)
    router(make_rows(64, 8, dtype=torch.float32)[rank * 32 : (rank + 1) * 32])
    torch.save(router.balance, f"{out}/balance-{rank}.pt")
    dist.barrier()
    os._exit(0)  # torch's own threads sometimes abort a process that takes the group apart; all is written
