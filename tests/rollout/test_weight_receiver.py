"""The receiver without an engine: weights that change while they are copied are refused."""

import pytest
import torch

from paceline.rollout.weight_receiver import WeightReceiver
from paceline.weights_sync.handle import WeightSyncError
from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard, SharedMemoryPublisher


class OvertakenModel(torch.nn.Module):
    """A writer publishes over the weights while it is loading them."""

    def __init__(self, overtake):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.overtake = overtake

    def load_weights(self, weights):
        for _, tensor in weights:
            self.overtake()
            self.weight.data.copy_(tensor)
        return {"weight"}


@pytest.mark.parametrize("overtaken", [False, True])
def test_weights_overwritten_while_they_are_copied_are_refused(tmp_path, overtaken):
    publisher = SharedMemoryPublisher(
        str(tmp_path), Layout((TensorSpec("weight", (8,), "float32"),))
    )

    def write(version):
        publisher.write(version, [Shard("weight", (slice(0, 8),), torch.full((8,), version + 1.0))])

    write(0)
    handle = publisher.commit(0)
    model = OvertakenModel(lambda: write(2) if overtaken else None)  # two files take turns
    receiver = WeightReceiver()
    receiver.model_runner = type("Runner", (), {"get_model": lambda self: model})()
    if overtaken:
        with pytest.raises(WeightSyncError, match="refusing to serve"):
            receiver.load_published_weights(handle)
    else:
        receiver.load_published_weights(handle)
        assert model.weight.data.tolist() == [1.0] * 8
