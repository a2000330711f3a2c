"""Packed weights follow the parameters they come from, whatever changes these and in whatever thread."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, vector_to_parameters

import fastff
from conftest import make_layer, make_rows, weights_of
from fastff.ops import reference
from fastff.ops.packed import RECHECK
from pairs import every_pair
from threads_case import check_whole

NAMES = ("w_in", "b_in", "w_out", "b_out")
KINDS = {None: 1e-5, "bf16": 0.05, "int8": 0.05}
X = make_rows(40, 24, dtype=torch.float32)


def tree(**options):
    return make_layer(24, depth=3, node_output=False, leaf_width=2, bias=True, **options)


def fresh(layer):
    """A layer that never packed anything, with the weights that this one has now."""
    twin = tree(gate=layer.config.gate)
    with torch.no_grad():
        for name, value in weights_of(layer)._asdict().items():
            getattr(twin, name).copy_(value)
    return twin.quantize(layer.quantization).eval()


def answer(layer, x=X):
    with torch.no_grad():
        return layer(x).clone()


def other(layer, name):
    value = getattr(layer, name)
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value) * value.std()


def in_place(change):
    def edit(layer, name):
        with torch.no_grad():
            change(getattr(layer, name), other(layer, name))

    return edit


def one_element(weight, value):
    weight.view(-1)[0] += 3.0


def through_numpy(weight, value):
    weight.detach().numpy()[...] = value.numpy()


def through_a_view(weight, value):
    weight[0].mul_(-1)


def given_other_storage(weight, value):
    weight.set_(value)


def swapped(layer, name):
    torch.utils.swap_tensors(getattr(layer, name), nn.Parameter(other(layer, name)))


def replaced(layer, name):
    setattr(layer, name, nn.Parameter(other(layer, name)))


def replaced_and_freed(layer, name):
    """The next parameter may lie at the address of the last."""
    for _ in range(3):
        setattr(layer, name, nn.Parameter(other(layer, name)))


def new_data(layer, name):
    getattr(layer, name).data = other(layer, name)


def new_data_at_the_old_address(layer, name):
    weight = getattr(layer, name)
    value = other(layer, name)
    weight.data = torch.empty(0)
    weight.data = value


def loaded(layer, name):
    layer.load_state_dict({**layer.state_dict(), name: other(layer, name)})


def assigned(layer, name):
    layer.load_state_dict({**layer.state_dict(), name: other(layer, name)}, assign=True)


def from_a_vector(layer, name):
    vector_to_parameters(other(layer, name).flatten(), [getattr(layer, name)])


def frozen(layer, name):
    getattr(layer, name).requires_grad_(False).mul_(-1)


def in_inference_mode(layer, name):
    with torch.inference_mode():
        getattr(layer, name)[0].mul_(-1)


def of_inference_mode(layer, name):
    with torch.inference_mode():
        setattr(layer, name, nn.Parameter(other(layer, name)))


def within_updating(change):
    def edit(layer, name):
        with layer.updating():
            change(getattr(layer, name).data, other(layer, name))

    return edit


def then_train(change):
    def edit(layer, name):
        change(getattr(layer, name).data, other(layer, name))
        layer.train()
        layer.eval()

    return edit


def a_middle_row(weight, value):
    weight.detach().numpy()[0, weight.shape[1] // 2] += 2.0


def middle_elements(weight, value):
    weight.view(-1)[1:-1] *= -1


def shared(layer, name):
    layer.share_memory()
    in_place(torch.Tensor.copy_)(layer, name)


def there_and_back(layer, name):
    layer.double().float()
    in_place(torch.Tensor.copy_)(layer, name)


def copied(layer, name):
    """The twin of a deep copy must not be edited with it."""
    twin, before = copy.deepcopy(layer), answer(layer)
    in_place(torch.Tensor.copy_)(twin, name)
    assert torch.equal(answer(layer), before)
    layer.__dict__.update(twin.__dict__)


SEEN_AT_ONCE = {
    "copy_": in_place(torch.Tensor.copy_),
    "add_": in_place(torch.Tensor.add_),
    "neg_": in_place(lambda w, v: w.neg_()),
    "zero_": in_place(lambda w, v: w.zero_()),
    "init": in_place(lambda w, v: nn.init.uniform_(w, -1, 1)),
    "out=": in_place(lambda w, v: torch.mul(v, 1, out=w.detach())),
    "one element": in_place(one_element),
    "a view": in_place(through_a_view),
    "foreach": in_place(lambda w, v: torch._foreach_add_([w], [v])),
    "masked_fill_": in_place(lambda w, v: w.masked_fill_(v > 0, 0.5)),
    "index_copy_": in_place(lambda w, v: w.index_copy_(1, torch.tensor([0, 1, 2, 3]), v[:, :4])),
    "set_": in_place(given_other_storage),
    "data.copy_": in_place(lambda w, v: w.data.copy_(v)),
    "data.fill_": in_place(lambda w, v: w.data.fill_(0.7)),
    "data.sub_": in_place(lambda w, v: w.data.sub_(v)),
    "detach().mul_": in_place(lambda w, v: w.detach().mul_(-2)),
    "numpy": in_place(through_numpy),
    "swap_tensors": swapped,
    "a new parameter": replaced,
    "new parameters": replaced_and_freed,
    "data =": new_data,
    "data = None, data =": new_data_at_the_old_address,
    "load_state_dict": loaded,
    "load_state_dict, assign": assigned,
    "vector_to_parameters": from_a_vector,
    "frozen": frozen,
    "inference_mode": in_inference_mode,
    "of inference_mode": of_inference_mode,
    "numpy row, updating": within_updating(a_middle_row),
    "elements, updating": within_updating(middle_elements),
    "numpy row, train": then_train(a_middle_row),
    "elements, train": then_train(middle_elements),
    "share_memory": shared,
    "dtypes": there_and_back,
    "deepcopy": copied,
}


@every_pair(way=SEEN_AT_ONCE, name=NAMES, kind=KINDS)
def test_the_next_call_uses_the_edited_weight(name, way, kind):
    layer = tree(quantization=kind).eval()
    before = answer(layer)
    assert layer._packed.bytes > 0
    SEEN_AT_ONCE[way](layer, name)
    after = answer(layer)
    assert torch.equal(after, answer(fresh(layer)))
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, reference.forward(X, weights_of(layer), config=layer.config).y, rtol=0.1, atol=1)


def sgd(layer, lr=0.3):
    return torch.optim.SGD(layer.parameters(), lr=lr)


def by_hand_through_data(layer):
    for parameter in layer.parameters():
        parameter.data -= 0.3 * parameter.grad


def by_a_flat_buffer(layer):
    flat = torch.cat([p.detach().flatten() for p in layer.parameters()])
    steps = torch.cat([p.grad.flatten() for p in layer.parameters()])
    start = 0
    for parameter in layer.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    answer(layer)
    layer(X)  # the next step's forward
    flat -= 0.3 * steps


STEPS = {
    "SGD": lambda layer: sgd(layer).step(),
    "SGD foreach": lambda layer: torch.optim.SGD(layer.parameters(), lr=0.3, foreach=True).step(),
    "SGD fused": lambda layer: torch.optim.SGD(layer.parameters(), lr=0.3, fused=True).step(),
    "Adam": lambda layer: torch.optim.Adam(layer.parameters(), lr=0.3).step(),
    "AdamW fused": lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.3, fused=True).step(),
    "by hand": by_hand_through_data,
    "flat buffer": by_a_flat_buffer,
}


@pytest.mark.parametrize("trains", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", [None, "boundary"])
@pytest.mark.parametrize("step", STEPS)
def test_the_next_call_uses_the_weights_after_a_step(step, gate, trains):
    """In evaluation mode too, and where the step leaves the root and the last leaf alone (no gate, few rows)."""
    layer = tree(gate=gate).eval()
    before = answer(layer)
    layer.train(trains)
    layer(X[:3]).square().sum().backward()
    STEPS[step](layer)
    layer.eval()
    assert torch.equal(answer(layer), answer(fresh(layer)))
    assert not torch.allclose(answer(layer), before, atol=1e-4)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def pruned(layer, name):
    prune.l1_unstructured(layer, name, amount=0.5)


def parametrized(layer, name):
    parametrize.register_parametrization(layer, name, Doubled())


def parametrized_and_removed(layer, name):
    parametrized(layer, name)
    answer(layer)
    parametrize.remove_parametrizations(layer, name)


def weight_normed(layer, name):
    parametrizations.weight_norm(layer, name)
    with torch.no_grad():
        getattr(layer.parametrizations, name).original0.mul_(3)


def weight_normed_by_a_hook(layer, name):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer, name)
    with torch.no_grad():
        getattr(layer, f"{name}_g").mul_(3)


def spectral_normed(layer, name):
    parametrizations.spectral_norm(layer, name)


def a_plain_tensor(layer, name):
    """As DataParallel's replicas and FSDP's flat parameters have in the place of a parameter."""
    value = other(layer, name)
    delattr(layer, name)
    setattr(layer, name, value)


def a_buffer(layer, name):
    value = other(layer, name)
    delattr(layer, name)
    layer.register_buffer(name, value)


REPLACED = {
    f.__name__: f
    for f in (
        pruned,
        parametrized,
        parametrized_and_removed,
        weight_normed,
        weight_normed_by_a_hook,
        spectral_normed,
        a_plain_tensor,
        a_buffer,
    )
}


@every_pair(way=REPLACED, name=("w_in", "w_out", "b_out"), kind=KINDS)
def test_what_stands_in_the_place_of_a_parameter_is_used(name, way, kind):
    layer = tree(quantization=kind).eval()
    before = answer(layer)
    REPLACED[way](layer, name)
    after = answer(layer)
    torch.testing.assert_close(after, answer(fresh(layer)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(answer(layer), answer(fresh(layer)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_weights_it_is_given(kind):
    layer = tree(quantization=kind).eval()
    before = answer(layer)
    for seed in range(6):  # tensors that die at once, so that the next may have their addresses
        weights = {n: p.detach().clone() for n, p in tree(seed=seed).named_parameters()}
        for name in NAMES[: 1 + seed % 4]:
            given = {name: weights[name]}
            with torch.no_grad():
                got = functional_call(layer, given, X)
            twin = copy.deepcopy(layer)
            twin.load_state_dict({**layer.state_dict(), **given})
            assert torch.equal(got, answer(fresh(twin)))
    assert torch.equal(answer(layer), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_an_error_not_a_read_beyond_the_end(name, kind):
    layer = tree(quantization=kind).eval()
    answer(layer)
    right = getattr(layer, name)
    for wrong in (right[:, :1], right.transpose(0, -1).contiguous(), right.flatten(), right[:0], None):
        setattr(layer, name, None if wrong is None else nn.Parameter(wrong.detach().clone()))
        with pytest.raises(fastff.ShapeError, match=f"{name} .* does not match"):
            answer(layer)
    setattr(layer, name, right)
    getattr(layer, name).data = torch.zeros(2, 2)
    with pytest.raises(fastff.ShapeError, match=rf"{name} \(2, 2\) does not match"):
        answer(layer)


def test_memory_that_was_taken_away_is_not_read():
    layer = tree().eval()
    answer(layer)
    layer.w_out.untyped_storage().resize_(0)  # as FSDP frees what it has gathered
    with pytest.raises((fastff.FastffError, RuntimeError)):
        answer(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_part_edited_behind_autograds_back_is_noticed_within_the_promised_rows(name, kind):
    layer = tree(quantization=kind).eval()
    answer(layer)
    middle_elements(getattr(layer, name).data, None)
    rows = RECHECK * layer.config.neurons // layer.config.active_neurons
    answer(layer, torch.zeros(rows, 24))
    assert torch.equal(answer(layer), answer(fresh(layer)))


def test_the_pack_lives_until_training_begins_or_ends():
    layer = tree().eval()
    answer(layer)
    assert layer.eval()._packed.bytes > 0, "calling eval() before each evaluation must not cost a pack"
    assert layer.train()._packed.bytes == 0
    layer.eval()
    answer(layer)
    assert layer._packed.bytes > 0


def test_a_replaced_pack_is_freed():
    layer = fastff.FFF(256, depth=9).eval()  # 4 MB packed

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    x = torch.zeros(1, 256)
    for _ in range(3):
        layer.w_in.data.mul_(1.01)
        answer(layer, x)
    before = resident()
    for _ in range(30):
        layer.w_in.data.mul_(1.01)
        answer(layer, x)
    assert resident() - before < 30e6


def new_parameters(layer, weights):
    layer.w_out = weights["w_out"]


def load(layer, weights):
    layer.load_state_dict(weights)


def edit_within_updating(layer, weights):
    with layer.updating():
        for name, value in weights.items():
            getattr(layer, name).data.copy_(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [new_parameters, load, edit_within_updating], ids=lambda f: f.__name__)
def test_sixteen_threads_see_whole_weights_while_one_writes(write, kind):
    layer = make_layer(64, depth=6, quantization=kind).eval()
    x = make_rows(3, 64, dtype=torch.float32)
    states = [make_layer(64, depth=6, seed=seed).state_dict() for seed in (1, 2)]
    if write is new_parameters:  # one tensor: the others stay
        states = [{**states[0], "w_out": nn.Parameter(state["w_out"])} for state in states]
    whole = []
    for state in states:
        twin = make_layer(64, depth=6, quantization=kind).eval()
        twin.load_state_dict({k: v.detach() for k, v in state.items()})
        whole.append(answer(twin, x))
    layer.load_state_dict({k: v.detach() for k, v in states[0].items()})
    check_whole(layer, x, whole, [partial(write, layer, states[turn % 2]) for turn in range(24)])
