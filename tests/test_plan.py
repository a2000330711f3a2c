"""Plans of the GPU kernels, which are pure functions, and how they shrink to what a device has room for."""

from __future__ import annotations

import pytest
import torch

from fastff import ops
from fastff.config import TreeConfig
from fastff.ops import triton_kernels
from fastff.ops.triton_kernels import plan


class TestPlan:
    @pytest.mark.parametrize("count", [1, 100, 65536])
    def test_stages_cover_every_level_once(self, count):
        for depth in range(25):
            for trees in (1, 2, 3, 16):
                for leaf_width in (1, 16):
                    shape = TreeConfig(in_features=8, out_features=8, depth=depth, trees=trees, leaf_width=leaf_width)
                    chosen = plan.grouped_plan(shape, count, 2)
                    levels = [stage.level + i for stage in chosen.stages for i in range(stage.levels)]
                    assert levels == list(range(depth + chosen.leaf_routed))
                    assert chosen.level * chosen.joint <= 24
                    if chosen.leaf_routed:
                        assert chosen.stages[-1].level == chosen.level

    @pytest.mark.parametrize("depth", range(0, 25, 3))
    def test_groups_stay_few_however_deep_the_tree(self, depth):
        for trees in (1, 4):
            shape = TreeConfig(in_features=8, out_features=8, depth=depth, trees=trees)
            chosen = plan.forward_plan(shape, 2**20, 2)
            if isinstance(chosen, plan.GroupedPlan):
                assert all(stage.level * stage.joint <= 12 for stage in chosen.stages)
                assert chosen.level * chosen.joint <= 12
            back = plan.backward_plan(shape, 2**20, 2)
            assert back.level * back.joint <= 12
            assert back.outer_level <= 12

    def test_a_handful_a_few_and_many_rows_take_different_forms(self):
        shape = TreeConfig(in_features=768, out_features=768, depth=11)
        forms = [type(plan.forward_plan(shape, count, 2)) for count in (1, 100, 65536)]
        assert forms == [plan.SpeculativePlan, plan.PerTokenPlan, plan.GroupedPlan]
        explained = [ops.explain(shape, count, dtype=torch.bfloat16, backend="triton") for count in (1, 100, 65536)]
        assert [e.form for e in explained] == ["speculative", "per_token", "grouped"]
        tiles = plan.grouped_plan(shape, 65536, 2).tiles
        assert explained[2].choices["tiles.rows"] == tiles.rows
        assert explained[2].choices["stages.1.level"] == 6
        assert "backward.chunk" in explained[0].choices


class TestFitting:
    @pytest.fixture
    def no_room(self):
        return pytest.importorskip("triton.runtime.errors", reason="the error is Triton's").OutOfResources

    def test_tiles_shrink_until_they_fit(self, no_room):
        tried = []

        def run(chosen):
            tried.append(chosen.tiles)
            if chosen.tiles.stages > 1 or chosen.tiles.outer > 32:
                raise no_room(300000, 232448, "shared memory")
            return "done"

        chosen = plan.grouped_plan(TreeConfig(in_features=64, out_features=36, depth=11), 65536, 2)
        assert triton_kernels.fitting(chosen, run) == "done"
        count = len(tried)
        assert triton_kernels.fitting(chosen, run) == "done"
        assert len(tried) == count + 1  # what fitted is remembered

    def test_the_smallest_tiles_that_do_not_fit_are_an_error(self, no_room):
        def run(chosen):
            raise no_room(300000, 1, "shared memory")

        with pytest.raises(no_room):
            triton_kernels.fitting(
                plan.grouped_plan(TreeConfig(in_features=20, out_features=36, depth=9), 4096, 2), run
            )

    def test_a_recording_has_nothing_of_the_tiles_that_did_not_fit(self, no_room, monkeypatch):
        launch = pytest.importorskip("fastff.ops.triton_kernels.launch", reason="the package triton")
        monkeypatch.setattr(launch, "_may_launch_directly", lambda: False)  # there is no GPU
        chosen = plan.grouped_plan(TreeConfig(in_features=28, out_features=36, depth=7), 2048, 2)
        done = []

        def run(x, tiles):
            made = launch.new(x, 3)
            launch.apply(lambda to, of: (done.append(tiles.stages), to.copy_(of)), made, x)
            if tiles.stages > 1:
                raise no_room(300000, 232448, "shared memory")
            return (made,)

        def layer(x):
            return triton_kernels.fitting(chosen, lambda fitted: run(x, fitted.tiles))

        for value in (1.0, 2.0):
            (y,) = launch.replay("a layer that does not fit at once", layer, torch.full((3,), value))
            assert y.tolist() == [value] * 3
        assert chosen.tiles.stages > 1
        assert done[-2:] == [1, 1], "the second call repeats what fitted"
        assert done.count(1) == 2
