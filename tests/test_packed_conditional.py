"""Packed leaves and routers follow the weights they come from, also through edits that autograd does not see."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fastff
from conftest import make_rows
from fastff.ops.followed import RECHECK
from pairs import every_pair
from threads_case import check_whole

ROUTERS = {
    "tree": lambda: fastff.TreeRouter(24, 3, 2, bias=True),
    "paths": lambda: fastff.TreeRouter(24, 4, paths=4, bias=True),
    "flat": lambda: fastff.FlatRouter(24, 16, 4, bias=True),
    "product_key": lambda: fastff.ProductKeyRouter(24, 4, 4, bias=True),
}
LEAVES = ("w_in", "b_in", "w_out", "b_out")
OF_ROUTER = ("router.weight", "router.bias", "router.balance")
KINDS = ("bf16", "int8")
X = make_rows(200, 24, dtype=torch.float32)


def make(router, kind):
    torch.manual_seed(0)
    layer = fastff.ConditionalFeedforward(24, router=ROUTERS[router](), leaves=16, leaf_width=3, bias=True)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return layer.quantize(kind).eval()


def answer(layer, x=X):
    with torch.no_grad():
        return layer(x).clone()


def tensor_of(layer, name):
    if name == "router.balance" and layer.router.balance is None:
        pytest.skip("greedy trees have no balance")
    return (layer.get_buffer if name == "router.balance" else layer.get_parameter)(name)


def check_follows(layer, before):
    after = answer(layer)
    assert torch.equal(after, answer(copy.deepcopy(layer))), "a copy packs anew"
    assert not torch.allclose(after, before, atol=1e-3)


def numpy_rows(tensor):
    flat = tensor.detach().numpy().reshape(-1)
    flat[len(flat) // 4 : -len(flat) // 4] += 2.0
    flat[len(flat) // 2 : -1] *= -1.0


def middle_elements(tensor):
    tensor.data.view(-1)[1:-1] *= -1


def whole_data(tensor):
    tensor.data.mul_(-1.5)


def whole_numpy(tensor):
    tensor.detach().numpy()[...] *= -1.5


def new_data(tensor):
    tensor.data = -1.5 * tensor.data


@every_pair(edit=[whole_data, whole_numpy, new_data], name=(*LEAVES, *OF_ROUTER), router=ROUTERS, kind=KINDS)
def test_the_next_call_sees_an_edit_of_a_whole_tensor(edit, name, router, kind):
    layer = make(router, kind)
    before = answer(layer)
    edit(tensor_of(layer, name))
    check_follows(layer, before)


@every_pair(edit=[numpy_rows, middle_elements], name=(*LEAVES, *OF_ROUTER), router=ROUTERS, kind=KINDS)
def test_the_call_after_training_sees_an_edit_of_a_part(edit, name, router, kind):
    layer = make(router, kind)
    before = answer(layer)
    edit(tensor_of(layer, name))
    layer.train()
    layer.eval()
    check_follows(layer, before)


@every_pair(edit=[numpy_rows, middle_elements], name=(*LEAVES, *OF_ROUTER), router=ROUTERS, kind=KINDS)
def test_an_edit_of_a_part_is_noticed_within_the_promised_reads(edit, name, router, kind):
    layer = make(router, kind)
    before = answer(layer)
    edit(tensor_of(layer, name))
    rows = max(
        RECHECK * layer.config.leaves // layer.router.k,
        RECHECK * layer.router.weight.numel() * 2 // layer.router.flops_per_row,
    )
    answer(layer, torch.zeros(rows, 24))
    check_follows(layer, before)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_call_after_one_that_recorded_gradients_sees_a_part(router):
    routed = make(router, "int8").router
    with torch.no_grad():
        before = routed(X)
    with torch.enable_grad():
        routed(X).gate.sum().backward()
    middle_elements(routed.weight)
    with torch.no_grad():
        after, fresh = routed(X), copy.deepcopy(routed)(X)
    assert torch.equal(after.leaf, fresh.leaf)
    assert torch.equal(after.gate, fresh.gate)
    assert not torch.equal(after.leaf, before.leaf)


@every_pair(name=["w_in", "w_out", "router.weight"], router=ROUTERS, kind=KINDS)
def test_sixteen_threads_see_whole_weights_while_one_replaces_a_tensor(name, router, kind):
    layer, x = make(router, kind), X[:3]
    owner, _, of_owner = name.rpartition(".")
    values = [layer.get_parameter(name), nn.Parameter(-layer.get_parameter(name).detach())]
    writes = [partial(setattr, layer.get_submodule(owner), of_owner, value) for value in values]
    whole = []
    for write in writes:
        write()
        whole.append(answer(copy.deepcopy(layer), x))
    check_whole(layer, x, whole, writes * 10)


def test_packs_live_until_training_begins_or_ends(monkeypatch):
    layer, packs = make("flat", "int8"), []
    original = type(layer)._pack
    monkeypatch.setattr(type(layer), "_pack", lambda self, weights: packs.append(1) or original(self, weights))
    for _ in range(3):
        answer(layer.eval())
    assert len(packs) == 1, "calling eval() before each evaluation must not cost a pack"
    layer.train()
    answer(layer.eval())
    assert len(packs) == 2
