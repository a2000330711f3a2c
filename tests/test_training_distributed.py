"""Two processes on the CPU do what one does: the loss curve, the leaf counts, a sharded checkpoint on one process. A
run goes on bit for bit after its process was killed."""

from __future__ import annotations

import json
import multiprocessing
import socket

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from distributed_case import killed_after, make, make_router, member, two_steps
from fastff.errors import TrainingError
from fastff.train import saving
from fastff.train.layer_training import LayerTraining
from fastff.train.pretrain import pretrain
from training_cases import small, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


# A server that imports Transformers once forks the processes.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["fastff.train.pretrain"])


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """The folder that two processes left."""
    out = tmp_path_factory.mktemp("two")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = [START.Process(target=member, args=(rank, 2, port, out, text)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(300)
        process.kill()  # one whose partner failed waits for it
    assert [process.exitcode for process in group] == [0, 0]
    return out


def test_the_loss_of_two_processes_is_that_of_one(two, text, tmp_path):
    ours = json.loads((two / "run" / "result.json").read_text())
    alone = pretrain(small(tmp_path / "run", text, steps=20, batch=8, save_every=100))
    assert (ours["processes"], alone["processes"]) == (2, 1)
    assert len(ours["curve"]) == 20
    for (step, loss), (_, want) in zip(ours["curve"], alone["curve"], strict=True):
        assert abs(loss - want) < 1e-5, step
    assert abs(ours["valid_loss"] - alone["valid_loss"]) < 1e-5
    assert ours["rows"] == alone["rows"]
    assert ours["routing"] == alone["routing"]  # the leaf counts of both processes, summed


def test_one_process_goes_on_where_two_stopped(two, text):
    """The same settings on another number of processes: the run is found finished, its checkpoint fits."""
    settings = small(two / "run", text, steps=20, batch=8, save_every=100)
    record = pretrain(settings)
    (two / "run" / "result.json").unlink()
    again = pretrain(settings)
    assert (again["processes"], again["valid_loss"]) == (1, pytest.approx(record["valid_loss"], abs=1e-6))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it should be here
def test_a_sharded_checkpoint_of_two_processes_loads_on_one(two):
    model, optimizer = make()
    losses = two_steps(model, optimizer)
    torch.testing.assert_close(torch.load(two / "fsdp-losses.pt"), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    fresh, fresh_optimizer = make(seed=1)
    weights, moments = get_state_dict(fresh, fresh_optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=two / "fsdp")
    set_state_dict(fresh, fresh_optimizer, model_state_dict=weights, optim_state_dict=moments)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], want, rtol=1e-4, atol=1e-5)
    two_steps(fresh, fresh_optimizer)


def test_balance_sums_the_load_of_all_processes(two):
    """Two processes with other rows each move their balance as one process with all rows does."""
    (router, x), (alone, _) = make_router(), make_router()
    router(x), alone(x[:32])
    assert not torch.equal(router.balance, alone.balance), "the halves must differ"
    for rank in range(2):
        assert torch.equal(torch.load(two / f"balance-{rank}.pt"), router.balance)


def test_sharding_where_it_cannot_be(text, tmp_path):
    with pytest.raises(TrainingError, match="several processes with a GPU each"):
        pretrain(small(tmp_path, text, fsdp=True))
    with pytest.raises(TrainingError, match="not made for fsdp"):
        small(tmp_path, text, fsdp=True, layer=LayerTraining(level_lr_scale=0.5))


def test_a_killed_run_goes_on_bit_for_bit(text, tmp_path):
    whole = pretrain(small(tmp_path / "whole", text))
    out = tmp_path / "run"
    process = START.Process(target=killed_after, args=(5, torch.get_num_threads(), out, text))
    process.start()
    process.join(300)
    assert process.exitcode == -9
    assert saving.last_checkpoint(out).name == "checkpoint-3"
    (out / saving.PARTIAL / "checkpoint-5").mkdir(parents=True)  # and it was saving when it died
    resumed = pretrain(small(out, text))
    assert resumed["curve"] == whole["curve"]
    assert resumed["valid_loss"] == whole["valid_loss"]
    ours, theirs = (
        torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True) for folder in (out, tmp_path / "whole")
    )
    assert all(torch.equal(a["exp_avg"], theirs["state"][key]["exp_avg"]) for key, a in ours["state"].items())
    assert not (out / saving.PARTIAL).exists()
