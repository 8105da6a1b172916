"""Pieces of fused experts, however they were cut, tile the tensors that checkpoints have."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.learner.checkpoints.checkpoint_names import shapes_on_disk, shards_on_disk
from paceline.weights_sync.shared_memory import Shard

NUM_EXPERTS, INTERMEDIATE, HIDDEN = 3, 4, 5
LAYER = "model.layers.7.mlp.experts"
SHAPES = {
    f"{LAYER}.gate_up_proj": (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN),
    f"{LAYER}.down_proj": (NUM_EXPERTS, HIDDEN, INTERMEDIATE),
    "model.layers.7.mlp.gate.weight": (NUM_EXPERTS, HIDDEN),
    "model.layers.6.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "model.norm.weight": (HIDDEN,),
}


def cuts(size):
    return st.lists(st.integers(0, size), max_size=2).map(lambda ends: sorted({0, *ends, size}))


def values_of(shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).float()


@given(st.data())
def test_pieces_of_any_cut_tile_every_tensor_on_disk_once(data):
    on_disk = {name: torch.full(shape, -1.0) for name, shape in shapes_on_disk(SHAPES)}
    for name, shape in SHAPES.items():
        ends = [data.draw(cuts(size)) for size in shape]
        slices = [[slice(a, b) for a, b in itertools.pairwise(e)] for e in ends]
        for where in itertools.product(*slices):
            for piece in shards_on_disk(Shard(name, where, values_of(shape)[where]), shape):
                target = on_disk[piece.name][piece.index]
                assert (target == -1).all()
                target.copy_(piece.values)
    fused = values_of(SHAPES[f"{LAYER}.gate_up_proj"])
    down = values_of(SHAPES[f"{LAYER}.down_proj"])
    for expert in range(NUM_EXPERTS):
        gate, up = fused[expert].chunk(2)
        assert torch.equal(on_disk.pop(f"{LAYER}.{expert}.gate_proj.weight"), gate)
        assert torch.equal(on_disk.pop(f"{LAYER}.{expert}.up_proj.weight"), up)
        assert torch.equal(on_disk.pop(f"{LAYER}.{expert}.down_proj.weight"), down[expert])
    assert {name: values.shape for name, values in on_disk.items()} == {
        name: shape for name, shape in SHAPES.items() if "experts" not in name
    }
    for name, values in on_disk.items():
        assert torch.equal(values, values_of(SHAPES[name]))


def test_a_whole_tensor_may_be_indexed_without_ends():
    name = f"{LAYER}.gate_up_proj"
    whole = Shard(name, (slice(None),) * 3, values_of(SHAPES[name]))
    assert len(list(shards_on_disk(whole, SHAPES[name]))) == 2 * NUM_EXPERTS


def test_tensors_without_experts_pass_untouched():
    piece = Shard("model.norm.weight", (slice(2, 4),), torch.ones(2))
    assert list(shards_on_disk(piece, (HIDDEN,))) == [piece]
