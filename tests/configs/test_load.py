from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.configs.load import dump_config, load_config, packaged_recipes
from paceline.configs.schema import RunConfig

MINIMAL: dict[str, Any] = {
    "name": "test",
    "model": {"path": "somewhere"},
    "data": {"source": {"type": "dataset", "path": "sums.jsonl"}},
    "reward": {"type": "math"},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def minimal(text: str = "", name: str = "run.yaml") -> Path:
    start = """\
        name: test
        model: {path: somewhere}
        data: {source: {type: dataset, path: sums.jsonl}}
        reward: {type: math}
        """
    return write(name, textwrap.dedent(start) + textwrap.dedent(text))


def complaints(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("recipe", sorted(packaged_recipes()))
def test_every_recipe_loads_from_anywhere_by_name_or_path_and_survives_a_dump(recipe: str) -> None:
    config = load_config(recipe)
    assert load_config(f"configs/recipes/{recipe}.yaml") == config
    write("dumped.yaml", dump_config(config))
    assert load_config("dumped.yaml") == config


def test_a_file_of_ones_own_goes_before_a_packaged_recipe() -> None:
    minimal(name="configs/recipes/quickstart.yaml")
    assert load_config("configs/recipes/quickstart.yaml").name == "test"
    assert load_config("quickstart").name == "quickstart"


def test_a_recipe_is_not_taken_for_a_missing_file_in_another_folder() -> None:
    assert "no such file" in complaints("mine/quickstart.yaml")[0]


def test_a_missing_file_names_the_recipes_and_the_nearest() -> None:
    (line,) = complaints("quickstrat.yaml")
    assert line.startswith("quickstrat.yaml: no such file")
    assert "debug, " in line
    assert line.endswith("did you mean quickstart?")


def test_overrides_are_read_as_yaml_and_the_last_one_wins() -> None:
    config = load_config(
        minimal(),
        [
            "loop.num_steps=7",
            "learner.optimizer.learning_rate=3e-4",
            "learner.optimizer.betas=[0.8, 0.9]",
            "warm_start.max_steps=50",
            "rollout.enforce_eager=false",
            "checkpoint.every_steps=null",
            "output_dir=a=b",
            "loop.num_steps=8",
        ],
    )
    assert config.loop.num_steps == 8
    assert config.learner.optimizer.learning_rate == 3e-4
    assert config.learner.optimizer.betas == (0.8, 0.9)
    assert config.warm_start is not None
    assert config.warm_start.max_steps == 50
    assert config.rollout.enforce_eager is False
    assert config.checkpoint.every_steps is None
    assert config.output_dir == "a=b"


def test_free_sections_hold_numbers_and_words_as_they_look() -> None:
    architecture = "{model_type: no, eps: 1e-6, big: 1_000, day: 2024-01-01, at: 1:30, on: true}"
    config = load_config(
        minimal(), [f"model={{path: null, tokenizer: characters, architecture: {architecture}}}"]
    )
    assert config.model.architecture == {
        "model_type": "no",
        "eps": 1e-6,
        "big": 1000,
        "day": "2024-01-01",
        "at": "1:30",
        "on": True,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.num_steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("loop..num_steps=3", "expected key.path=value"),
        ("loop.num_steps=[1", "the value is not YAML"),
        ("model={a: 1, a: 2}", "the value is not YAML: key 'a' is given twice"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(override: str, message: str) -> None:
    (line,) = complaints(minimal(), override)
    assert line.startswith(f"override {override!r}: {message}")


def test_every_mistake_gets_a_line_with_its_place_its_key_and_a_suggestion() -> None:
    path = write(
        "bad.yaml",
        """\
        name: bad name
        model:
          path: somewhere
          precison: float32
        data:
          source:
            type: reasoning_gymm
        reward:
          type: exact
          time_limit_seconds: -3
        loop:
          num_steps: many
        algorithm: {type: grpo, zero_signal: dropp}
        optimizer: {learning_rate: 1}
        learner:
        """,
    )
    lines = complaints(path, "rollout.num_worker=2", "loop.max_lag=1.5")
    expected = [
        ("bad.yaml:1: name: expected text matching", "got 'bad name'"),
        ("bad.yaml:4: model.precison: unknown key (got 'float32')", "did you mean precision?"),
        ("bad.yaml:6: data.source: unknown type 'reasoning_gymm'", "did you mean reasoning_gym?"),
        ("bad.yaml:10: reward.time_limit_seconds: expected greater than 0", "got -3"),
        ("bad.yaml:12: loop.num_steps: expected integer", "got 'many'"),
        ("bad.yaml:13: algorithm.zero_signal: expected one of drop, keep", "did you mean drop?"),
        (
            "bad.yaml:14: optimizer: unknown key",
            "did you mean learner.optimizer or algorithm.critic.optimizer?",
        ),
        ("bad.yaml:15: learner: expected a section", "got None"),
        ("override 'rollout.num_worker=2': rollout.num_worker: unknown", "mean num_workers?"),
        ("override 'loop.max_lag=1.5': loop.max_lag: expected integer", "got 1.5"),
    ]
    for start, end in expected:
        assert any(line.startswith(start) and line.endswith(end) for line in lines), (start, lines)
    assert len(lines) == len(expected)


def test_what_is_missing_is_named() -> None:
    assert complaints(write("empty.yaml", "name: x\nmodel: {path: y}\ndata: {source: {}}\n")) == [
        "empty.yaml:3: data.source: its key type is missing; "
        "give one of reasoning_gym, dataset, import",
        "empty.yaml: reward: required, but missing",
    ]
    (line,) = complaints(minimal(), "data.source.type=reasoning_gym")
    assert line == "run.yaml:3: data.source.task: required, but missing"


def test_a_key_that_was_renamed_names_the_new_one() -> None:
    (line,) = complaints(minimal(), "rollout.drafting.traces=[a.jsonl]")
    assert "rollout.drafting.traces: unknown key" in line
    assert line.endswith("it is called rollout.drafting.corpus now")


def test_an_unknown_key_of_a_union_is_looked_up_in_the_chosen_variant() -> None:
    (line,) = complaints(minimal(), "data.source.splt=test")
    assert line.endswith("data.source.splt: unknown key (got 'test'); did you mean split?")


def test_contradictions_between_sections_come_as_one_line() -> None:
    (line,) = complaints(minimal(), "rollout.sampling.max_tokens=512")
    assert line.startswith("run.yaml: rollout.sampling.max_tokens (512) leaves no room")


def test_drift_is_not_measured_where_all_samples_are_of_the_current_version() -> None:
    drafting = "rollout.drafting={max_drift: 0.5}"
    (line,) = complaints(minimal(), drafting, "loop.max_lag=0")
    assert "max_drift is measured on samples of older versions" in line
    load_config(minimal(), (drafting, "loop.max_lag=1"))


def test_a_hanging_rank_is_named_before_its_neighbours_give_up() -> None:
    config = load_config(minimal(), ("learner.collective_timeout_seconds=30",))
    assert config.learner.longest_wait_seconds == 15
    (line,) = complaints(minimal(), "learner.hang_seconds=120")
    assert "learner.hang_seconds (120) must be less than" in line


@pytest.mark.parametrize(("recipe", "given"), [("sft", 1), ("dpo", 2)])
def test_what_the_data_source_gives_is_not_a_number_of_samples(recipe: str, given: int) -> None:
    (line,) = complaints(recipe, "loop.samples_per_group=4")
    assert f"is 4, but {recipe} trains on {given} of the data source's" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y\n", "bad.yaml:2: key 'name' is given twice"),
        (
            "name: x\nloop:\n  max_lag: 1\n  max_lag: 1\n",
            "bad.yaml:4: key 'max_lag' is given twice",
        ),
        ("name: x\nmodel: [1,\n", "bad.yaml:3: "),
        ("name: x\n\tmodel: y\n", "bad.yaml:2: "),
        ("name: x\nloop: \x01\n", "bad.yaml:2: "),
        ("", "bad.yaml: expected sections (key: value), got nothing"),
        ("- a\n", "bad.yaml: expected sections (key: value), got list"),
        ("a: &x {b: *x}\n", "bad.yaml: nested deeper than"),
    ],
)
def test_text_that_is_no_configuration_is_named_with_its_line(text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    (line,) = complaints("bad.yaml")
    assert line.startswith(message)


def test_bytes_that_are_no_text_are_refused() -> None:
    Path("bad.yaml").write_bytes(b"name: \xff\n")
    assert complaints("bad.yaml") == ["bad.yaml: cannot be read: not UTF-8 text"]


def test_a_file_may_extend_another_key_by_key() -> None:
    minimal("loop: {num_steps: 5, groups_per_step: 4}\n", name="base/base.yaml")
    path = write("base/top.yaml", "extends: base.yaml\nloop: {num_steps: 6}\nwarm_start: {}\n")
    config = load_config(path, ["loop.max_lag=3"])
    assert (config.loop.num_steps, config.loop.groups_per_step, config.loop.max_lag) == (6, 4, 3)
    assert config.warm_start is not None


def test_a_file_may_extend_a_packaged_recipe() -> None:
    config = load_config(write("mine.yaml", "extends: quickstart.yaml\nname: mine\n"))
    assert config == load_config("quickstart").model_copy(update={"name": "mine"})


def test_mistakes_in_an_extended_file_are_named_there() -> None:
    minimal("loop: {num_stepz: 5}\n", name="base.yaml")
    path = write("top.yaml", "extends: base.yaml\nloop: {max_lags: 5}\n")
    starts = [line.split(": ")[0] for line in complaints(path)]
    assert sorted(starts) == ["base.yaml:5", "top.yaml:2"]


@pytest.mark.parametrize("chain", ["other.yaml", "top.yaml", "base.yaml"])
def test_only_one_level_may_be_extended(chain: str) -> None:
    minimal(name="other.yaml")
    minimal(f"extends: {chain}\n", name="base.yaml")
    path = write("top.yaml", "extends: base.yaml\n")
    (line,) = complaints(path)
    assert line.startswith("top.yaml:1: extends: base.yaml extends another file itself")


def test_extending_itself_or_nothing_is_refused() -> None:
    (line,) = complaints(write("self.yaml", "extends: self.yaml\n"))
    assert "extends another file itself" in line
    (line,) = complaints(write("gone.yaml", "extends: nowhere.yaml\n"))
    assert line.startswith("nowhere.yaml: no such file")
    (line,) = complaints(write("list.yaml", "extends: [a, b]\n"))
    assert line == "list.yaml:1: extends: expected one file name, got ['a', 'b']"


def test_a_section_whose_type_changes_is_replaced_whole() -> None:
    config = load_config("quickstart", ["data.source.type=dataset", "data.source.path=sums.jsonl",
                                        "reward.type=math"])  # fmt: skip
    assert config.data.source.type == "dataset"
    assert config.data.source.prompt_template == "{question}"
    assert config.reward.type == "math"


def test_a_section_whose_type_stays_is_merged() -> None:
    config = load_config("quickstart", ["data.source.type=reasoning_gym", "reward.threshold=0.5"])
    assert config.data.source == load_config("quickstart").data.source
    assert config.reward.threshold == 0.5


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(
        ["3e-4", "1_000", "0x1F", "null", "~", "no", "1:30", "2024-01-01", "<<", "="]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@given(
    parameters=st.dictionaries(st.text(max_size=6), anything, max_size=4),
    template=st.text(max_size=30),
    learning_rate=st.floats(min_value=1e-12, max_value=1e3, exclude_min=True),
    seed=st.integers(0, 2**63),
    every_steps=st.none() | st.integers(1, 10**6),
)
def test_a_dumped_configuration_loads_back_equal(
    parameters: dict[str, Any],
    template: str,
    learning_rate: float,
    seed: int,
    every_steps: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = RunConfig.model_validate(
        {
            **MINIMAL,
            "seed": seed,
            "data": {
                "source": {
                    "type": "import",
                    "import_path": "a:B",
                    "parameters": parameters,
                    "prompt_template": template,
                }
            },
            "learner": {"optimizer": {"learning_rate": learning_rate}},
            "evaluation": {"every_steps": every_steps},
        }
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
