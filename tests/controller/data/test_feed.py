from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import CheckpointError, ConfigError, DataError
from paceline.configs.schema.data import PromptFormat
from paceline.configs.vocabulary import Prompt, Record
from paceline.controller.data.feed import PromptFeed, PromptSet
from paceline.controller.data.rendering import PromptRenderer
from paceline.controller.data.sources import PromptSource
from paceline.controller.data.tokenizer import characters_tokenizer
from paceline.reward.reasoning_gym_task import ReasoningGymTaskSource

TOKENIZER = characters_tokenizer()


@dataclass
class CyclingSource:
    """Repeats a list of words, as a small dataset (finite) or a generated task (endless) does."""

    words: list[str]
    endless: bool = False

    @property
    def num_records(self) -> int | None:
        return None if self.endless else len(self.words)

    def record(self, index: int) -> Record:
        word = self.words[index % len(self.words)]
        return Record(f"word:{index}", {"word": word, "answer": word[::-1]}, word[::-1])


def renderer(max_length: int = 32, **prompt_format: object) -> PromptRenderer:
    chosen = PromptFormat.model_validate({"prompt_template": "{word}=", **prompt_format})
    return PromptRenderer(chosen, TOKENIZER, max_length, max_tokens=16)


def texts(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.text for prompt in prompts]


def draw(feed: PromptFeed, count: int) -> list[tuple[int, Prompt]]:
    return list(itertools.islice(feed, count))


def words_strategy(minimum: int) -> st.SearchStrategy[list[str]]:
    word = st.text(alphabet="abc", min_size=1, max_size=3)
    return st.lists(word, min_size=minimum, max_size=40)


@given(words=words_strategy(1), held_out=st.integers(1, 8), validation=st.integers(0, 8))
def test_kept_apart_prompts_are_distinct_and_never_fed(
    words: list[str], held_out: int, validation: int
) -> None:
    num_distinct = len(set(words))
    if held_out + validation > num_distinct:
        with pytest.raises(DataError, match="different prompts"):
            PromptSet(CyclingSource(words), renderer(), held_out, validation)
        return
    prompts = PromptSet(CyclingSource(words), renderer(), held_out, validation)
    kept = texts(prompts.held_out) + texts(prompts.validation)
    assert len(kept) == len(set(kept)) == held_out + validation
    feed = prompts.feed()
    if held_out + validation == num_distinct:
        with pytest.raises(DataError, match="every prompt is held out"):
            next(feed)
        return
    fed = [prompt.text for _, prompt in draw(feed, 3 * len(words))]
    assert not set(fed) & set(kept)
    assert set(fed) == {f"{word}=" for word in words} - set(kept)


@given(words=words_strategy(2), taken=st.integers(0, 60), later=st.integers(1, 60))
def test_a_restored_feed_goes_on_exactly_where_the_other_stopped(
    words: list[str], taken: int, later: int
) -> None:
    if len(set(words)) < 2:
        return
    prompts = PromptSet(CyclingSource(words), renderer(), 1)
    feed = prompts.feed()
    draw(feed, taken)
    state = json.loads(json.dumps(feed.state()))
    expected = draw(feed, later)
    resumed = PromptSet(CyclingSource(words), renderer(), 1).feed()
    resumed.restore(state)
    assert draw(resumed, later) == expected
    assert resumed.position == feed.position


def test_a_prompt_can_be_looked_up_by_its_position() -> None:
    prompts = PromptSet(CyclingSource(list("abcdefgh")), renderer(), 2)
    drawn = draw(prompts.feed(), 4)
    feed = prompts.feed()
    assert [(position, feed.at(position)) for position, _ in drawn] == drawn
    assert draw(feed, 4) == drawn


def test_positions_grow() -> None:
    prompts = PromptSet(CyclingSource(list("abcdcbabcd"), endless=True), renderer(), 2)
    positions = [position for position, _ in draw(prompts.feed(), 50)]
    assert positions == sorted(set(positions))


def test_resuming_on_other_held_out_prompts_is_refused() -> None:
    state = PromptSet(CyclingSource(list("abcdef")), renderer(), 2).feed().state()
    changed = PromptSet(CyclingSource(list("bacdef")), renderer(), 2, num_validation=1).feed()
    with pytest.raises(CheckpointError, match="held-out and validation prompts differ"):
        changed.restore(state)


def test_a_separate_held_out_split_is_used_and_its_prompts_left_out_of_training() -> None:
    train, test = CyclingSource(list("abcd")), CyclingSource(list("cxy"))
    prompts = PromptSet(train, renderer(), 3, num_validation=1, held_out_source=test)
    assert texts(prompts.held_out) == ["c=", "x=", "y="]
    assert texts(prompts.validation) == ["a="]
    assert {prompt.text for _, prompt in draw(prompts.feed(), 20)} == {"b=", "d="}


def test_an_endless_source_with_too_few_different_prompts_is_noticed() -> None:
    with pytest.raises(DataError, match="num_held_out asks for 5 different prompts, found 3"):
        PromptSet(CyclingSource(list("abc"), endless=True), renderer(), 5)


def test_the_quick_start_task_never_trains_on_a_held_out_word() -> None:
    source: PromptSource = ReasoningGymTaskSource(
        "spell_backward", {"min_word_len": 3, "max_word_len": 4}, seed=0
    )
    prompts = PromptSet(source, renderer(), 256, 128)
    kept = set(texts(prompts.held_out)) | set(texts(prompts.validation))
    assert len(kept) == 384
    feed = prompts.feed()
    first = feed.position
    fed = {prompt.text for _, prompt in draw(feed, 3000)}
    assert not fed & kept
    assert feed.position - first > 3000, "no word was skipped: the test would prove nothing"


def test_a_demonstration_is_the_gold_completion_and_a_stop_token() -> None:
    prompts = PromptSet(CyclingSource(["abc"]), renderer(), 1)
    (found,) = prompts.demonstration(prompts.held_out[0])
    assert found.text == "cba"
    assert found.token_ids.dtype == np.int32
    assert found.token_ids.tolist() == [ord("c"), ord("b"), ord("a"), TOKENIZER.eos_token_id]


def test_a_demonstration_fills_its_whole_allowance_and_no_more() -> None:
    make = renderer(max_length=64)
    fitting, longer = (make.prompt(CyclingSource(["a" * n]).record(0)) for n in (15, 16))
    assert len(make.demonstration(fitting).token_ids) == 16
    with pytest.raises(
        DataError, match=r"has 17 tokens, its stop token included, more than .* \(16\)"
    ):
        make.demonstration(longer)


def test_a_preference_is_both_completions_with_their_stop_tokens() -> None:
    make = renderer(chosen_template="{answer}", rejected_template="{word}")
    prompt = make.prompt(CyclingSource(["ab"]).record(0))
    chosen, rejected = (found.token_ids.tolist() for found in make.preference(prompt))
    assert chosen == [ord("b"), ord("a"), TOKENIZER.eos_token_id]
    assert rejected == [ord("a"), ord("b"), TOKENIZER.eos_token_id]


def test_pairs_that_cannot_be_preferred_or_found_are_refused() -> None:
    make = renderer(chosen_template="{answer}", rejected_template="{word}")
    with pytest.raises(DataError, match="prompt word:0 are the same"):
        make.preference(make.prompt(CyclingSource(["aa"]).record(0)))
    with pytest.raises(ConfigError, match="data.source.chosen_template: .*no field 'chosen'"):
        renderer().preference(make.prompt(CyclingSource(["ab"]).record(0)))


def test_prompts_fill_their_whole_allowance_and_no_more() -> None:
    make = renderer(max_length=32)
    assert len(make.prompt(CyclingSource(["a" * 15]).record(0)).token_ids) == 16
    with pytest.raises(DataError, match="prompt word:0 has 17 tokens, expected 1 to 16"):
        make.prompt(CyclingSource(["a" * 16]).record(0))
    with pytest.raises(DataError, match="has 0 tokens"):
        renderer(prompt_template="").prompt(CyclingSource(["a"]).record(0))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{wrod}=", "no field 'wrod'; they have answer, word"),
        ("{word", "no format string"),
        ("{}", "no format string"),
        ("\\boxed{0}", "no format string"),
        ("{word.letters}", "no format string"),
    ],
)
def test_a_template_that_does_not_fit_the_records_is_a_configuration_error(
    template: str, message: str
) -> None:
    for key in ("prompt_template", "answer_template"):
        make = renderer(**{key: template})
        with pytest.raises(ConfigError, match=f"data.source.{key}: .*{message}"):
            make.demonstration(make.prompt(CyclingSource(["abc"]).record(0)))


def test_a_chat_prompt_is_what_the_tokenizers_template_makes_of_it() -> None:
    tokenizer = characters_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chosen = PromptFormat(prompt_template="{word}?", chat=True, system_prompt="Be brief.")
    prompt = PromptRenderer(chosen, tokenizer, 64, 16).prompt(CyclingSource(["abc"]).record(0))
    assert prompt.text == "[system]Be brief.\n[user]abc?\n[assistant]"
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.source\.chat: .*set chat to false"):
        renderer(chat=True).prompt(CyclingSource(["abc"]).record(0))
