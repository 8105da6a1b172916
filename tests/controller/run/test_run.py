"""Resuming: the same run goes on, and what it was before stays on record."""

import shutil
from dataclasses import asdict

import pytest
import torch.distributed.checkpoint as dcp

from paceline.configs.errors import CheckpointError, ConfigError
from paceline.configs.forecast.model_shape import CHARACTERS_VOCABULARY
from paceline.configs.load import dump_config, load_config
from paceline.configs.schema.model import ModelConfig
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_json
from paceline.controller.run.checkpoints import LEARNER, SCHEMA, RunState
from paceline.controller.run.run import (
    error_line,
    keep_previous_config,
    require_same_run,
    run_training,
)
from paceline.learner.checkpoints.background_save import alone_is_fine
from paceline.learner.model.model import load_policy, write_initial_model


def folder_of(tmp_path, *overrides):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(dump_config(load_config("quickstart", overrides)))
    return folder


@pytest.mark.parametrize(
    "override", ["seed=5", "model.max_length=64", "data.num_held_out=8", "warm_start=null"]
)
def test_a_run_is_not_resumed_as_another_one(tmp_path, override):
    folder = folder_of(tmp_path)
    before = folder.config.read_text()
    name = override.split("=")[0].split(".")[0]
    with pytest.raises(ConfigError, match=f"--resume: {name} differ"):
        require_same_run(folder, load_config("quickstart", [override]))
    assert folder.config.read_text() == before


def test_settings_that_may_change_leave_the_old_ones_behind(tmp_path):
    folder = folder_of(tmp_path)
    for number in (1, 2):
        old = load_config(folder.config)
        new = load_config("quickstart", [f"loop.num_steps={old.loop.num_steps + 1}"])
        assert require_same_run(folder, new) == old
        keep_previous_config(folder, old, new)
        folder.write_config(dump_config(new))
        assert load_config(folder.root / f"config.{number}.yaml") == old


def test_an_unchanged_configuration_leaves_nothing_behind(tmp_path):
    folder = folder_of(tmp_path)
    same = load_config("quickstart")
    keep_previous_config(folder, same, same)
    assert [path.name for path in folder.root.iterdir()] == ["config.yaml"]


def test_an_error_is_said_in_one_line_with_its_type_unless_it_is_the_users():
    assert error_line(ConfigError("a\n  b")) == "a b"
    assert error_line(KeyError("x")) == "KeyError: 'x'"


def run_with_checkpoint(root, **sizes):
    """The folder of a run of a small model that has just saved; returns its configuration."""
    weights = root / "weights"
    architecture = {**load_config("quickstart").model.architecture, "hidden_size": 32, **sizes}
    model = ModelConfig(architecture=architecture, tokenizer="characters", max_length=32)
    write_initial_model(model, CHARACTERS_VOCABULARY, 1, 0, str(weights))
    config = load_config(
        "quickstart",
        [f"model={{architecture: null, path: {weights}}}", f"output_dir={root}", "name=run"],
    )
    folder = RunFolder.create(root / "run")
    folder.write_config(dump_config(config))
    step = folder.checkpoints / "step-000003"
    tensors = dict(load_policy(str(weights)).trained_parameters())
    alone_is_fine()
    dcp.save({"policy": {"model": tensors}}, checkpoint_id=step / LEARNER, no_dist=True)
    state = RunState(3, {}, (), {}, {}, None, {})
    write_json(step / "state.json", {"schema": SCHEMA, **asdict(state)})
    return config


def files_in(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["incomplete", "another model"])
def test_a_checkpoint_that_cannot_be_loaded_is_refused_and_nothing_is_written(tmp_path, what):
    config = run_with_checkpoint(tmp_path)
    if what == "incomplete":
        next((tmp_path / "run").rglob("*.distcp")).unlink()
    else:
        shutil.rmtree(tmp_path / "weights")
        run_with_checkpoint(tmp_path / "other", num_hidden_layers=3)
        (tmp_path / "other" / "weights").rename(tmp_path / "weights")
    before = files_in(tmp_path)
    changed = config.model_copy(update={"loop": config.loop.model_copy(update={"num_steps": 9})})
    with pytest.raises(CheckpointError, match=what) as caught:
        run_training(changed, resume=True)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == before
