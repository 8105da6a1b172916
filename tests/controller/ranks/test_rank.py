"""What the controller knows of a rank: calls that the learner's worker has, and what it reads."""

import inspect
import pickle
from dataclasses import replace

import numpy as np
import pytest

from paceline.configs.vocabulary import TrainBatch
from paceline.controller.ranks.learner_ranks import for_ranks
from paceline.controller.ranks.rank import Rank
from paceline.learner.batch.sequences import token_sequences
from paceline.learner.batch.tokens import batch_tokens
from paceline.learner.worker import LearnerWorker
from tests.controller.builders import make_group

CALLS = [name for name, member in vars(Rank).items() if inspect.isfunction(member)]


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("_")])
def test_the_worker_takes_every_call_with_the_same_arguments(name):
    expected = inspect.signature(getattr(Rank, name)).parameters.values()
    found = inspect.signature(getattr(LearnerWorker, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in found] == [
        (p.name, p.kind, p.default) for p in expected
    ]


def test_a_rank_is_sent_all_that_is_trained_on_and_no_text():
    group = make_group(3, rewards=(0.5, 1.0), version=2)
    drafted = np.full(4, 7, np.uint8)
    samples = (
        replace(s, text="a long answer", completion=replace(s.completion, draft_sources=drafted))
        for s in group.samples
    )
    prompt = replace(group.prompt, text="a long question", metadata={"field": "of the record"})
    batch = TrainBatch(4, (replace(group, prompt=prompt, samples=tuple(samples)),), 0.7)
    sent = for_ranks(batch)
    assert (sent.step, sent.group_ids, sent.temperature) == (4, (3,), 0.7)
    tables = [(batch_tokens(sent), batch_tokens(batch))]
    tables += zip(token_sequences(sent.groups), token_sequences(batch.groups), strict=True)
    for found, expected in tables:
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
    content = pickle.dumps(sent)
    assert not any(text in content for text in (b"a long", b"of the record", bytes(drafted)))
