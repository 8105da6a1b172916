"""Resuming: the same run goes on, and what it was before stays on record."""

import pytest

from paceline.configs.errors import ConfigError
from paceline.configs.load import dump_config, load_config
from paceline.controller.observe.folder import RunFolder
from paceline.controller.run import keep_previous_config, one_line, require_same_run


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
    assert one_line(ConfigError("a\n  b")) == "a b"
    assert one_line(KeyError("x")) == "KeyError: 'x'"
