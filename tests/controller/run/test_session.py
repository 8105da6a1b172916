"""A resumed run's engines draft from what its checkpoint and its ledger know, if they know it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from paceline.configs.load import load_config
from paceline.controller.data.tokenizer import characters_tokenizer
from paceline.controller.groups.buffer import State, Work
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.run.progress import RunProgress
from paceline.controller.run.recovery import Recovered
from paceline.controller.run.session import Session
from paceline.controller.wiring.drafting import trace_exchange
from paceline.controller.wiring.preparation import prompt_set
from paceline.controller.wiring.services import Services
from paceline.spec.trace_file import load_traces, save_traces
from paceline.spec.traces import traces_of
from tests.controller.builders import make_completion, make_group


@pytest.fixture
def session(tmp_path):
    config = load_config("debug", ("data.num_held_out=4", "rollout.drafting={}"))
    tokenizer = characters_tokenizer()
    inputs = SimpleNamespace(
        prompts=prompt_set(config, tokenizer), tokenizer=tokenizer, stop_token_ids=(1,)
    )
    unused = SimpleNamespace(generate=None)
    session = Session(
        Services(config, inputs, unused, unused, unused, exchange=trace_exchange(config, ())),
        SimpleNamespace(checkpoints=tmp_path),
        SimpleNamespace(message=(messages := []).append),
        RunProgress(),
        Journal(MemoryStore()),
        asyncio.Event(),
    )
    session.messages = messages
    return session


def versions(session):
    return [trace.version for trace in session._services.exchange.sampled()]


def test_engines_know_what_the_checkpoint_and_the_ledger_have(session, tmp_path):
    save_traces(traces_of((1, 2), make_completion(3)), tmp_path / "traces")
    group = make_group(0, version=4)
    recovered = Recovered(works=(Work(0, group.prompt, State.FINISHED, group),))
    asyncio.run(session._restore_drafting(tmp_path / "traces", recovered.groups))
    assert versions(session) == [3, 4, 4]
    assert session.messages == []


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_without_what_the_checkpoint_had_drafting_starts_cold_and_says_so(
    session, tmp_path, content
):
    if content is not None:
        (tmp_path / "traces").write_bytes(content)
    asyncio.run(session._restore_drafting(tmp_path / "traces", ()))
    assert versions(session) == []
    (message,) = session.messages
    assert message.startswith("drafting starts cold: ") and "\n" not in message


def test_what_was_given_is_not_saved_with_what_was_sampled(session, tmp_path):
    """It is given anew, by the files that the configuration then names."""
    sampled, given = (list(traces_of((1, 2), make_completion(version))) for version in (3, -1))
    session._services.exchange.give([*sampled, *given])
    asyncio.run(session._services.save_traces(str(tmp_path / "traces")))
    assert [trace.version for trace in load_traces(tmp_path / "traces")] == [3]
