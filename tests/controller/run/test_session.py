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
from paceline.controller.wiring.drafting import draft_publisher
from paceline.controller.wiring.preparation import prompt_set
from paceline.controller.wiring.services import Services
from paceline.spec.draft_file import load_draft_texts, save_draft_texts
from paceline.spec.draft_text import external_text, sampled_texts
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
        Services(config, inputs, unused, unused, unused, None, draft_publisher(config, ())),
        SimpleNamespace(checkpoints=tmp_path),
        SimpleNamespace(message=(messages := []).append),
        RunProgress(),
        Journal(MemoryStore()),
        asyncio.Event(),
    )
    session.messages = messages
    return session


def versions(session):
    return [text.version for text in session._services.draft_publisher.sampled_texts()]


def test_engines_know_what_the_checkpoint_and_the_ledger_have(session, tmp_path):
    save_draft_texts(sampled_texts((1, 2), make_completion(3)), tmp_path / "draft_corpus")
    group = make_group(0, version=4)
    recovered = Recovered(works=(Work(0, group.prompt, State.FINISHED, group),))
    asyncio.run(session._restore_drafting(tmp_path / "draft_corpus", recovered.groups))
    assert versions(session) == [3, 4, 4]
    assert session.messages == []


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_without_what_the_checkpoint_had_drafting_starts_cold_and_says_so(
    session, tmp_path, content
):
    if content is not None:
        (tmp_path / "draft_corpus").write_bytes(content)
    asyncio.run(session._restore_drafting(tmp_path / "draft_corpus", ()))
    assert versions(session) == []
    (message,) = session.messages
    assert message.startswith("drafting starts cold: ") and "\n" not in message


def test_texts_of_files_are_not_saved_with_what_was_sampled(session, tmp_path):
    """They are read anew, from the files that the configuration then names."""
    sampled = list(sampled_texts((1, 2), make_completion(3)))
    external = [external_text((1, 2), make_completion(3).token_ids)]
    session._services.draft_publisher.preload([*sampled, *external])
    asyncio.run(session._services.save_draft_corpus(str(tmp_path / "draft_corpus")))
    assert [text.version for text in load_draft_texts(tmp_path / "draft_corpus")] == [3]
