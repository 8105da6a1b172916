"""Ranks of every layout, which go through a run once for all laws."""

from __future__ import annotations

import pytest

from paceline.learner.model.model import write_initial_model
from tests.learner.conftest import VOCAB_SIZE, RankProcesses, model_config, run_ranks
from tests.learner.engines.layouts import LAYOUTS, Layout, Run, go_through_a_run


@pytest.fixture(scope="package")
def deepspeed_processes():
    """Processes of their own: DeepSpeed leaves things behind in its process."""
    with RankProcesses() as processes:
        yield processes


@pytest.fixture(scope="package")
def model_folders(model_folder, tmp_path_factory):
    """Models of 2 layers, and of 4 whose embeddings are tied, and not."""
    folders = {"shallow": model_folder}
    for name, is_tied in {"deep": True, "deep_untied": False}.items():
        config = model_config(num_hidden_layers=4, tie_word_embeddings=is_tied)
        folder = str(tmp_path_factory.mktemp(name))
        folders[name] = write_initial_model(config, VOCAB_SIZE, 1, seed=0, folder=folder)
    return folders


@pytest.fixture(scope="package")
def on_layout(rank_processes, deepspeed_processes, model_folders, tmp_path_factory):
    """``on_layout(layout, program, *arguments)``: every rank's result; see ``on_ranks``."""

    def run(layout, program, *arguments, **settings):
        processes = deepspeed_processes if "engine" in layout.settings else rank_processes
        folders = {"model_folder": model_folders[layout.model]}
        folders["weights_folder"] = tmp_path_factory.mktemp("weights")
        settings = {**folders, **layout.settings, **settings}
        return run_ranks(processes, layout.num_ranks, program, *arguments, **settings)

    return run


@pytest.fixture(scope="package")
def runs(on_layout, tmp_path_factory):
    """``runs(layout)``: a `Run` of the layout of this name, and one of one process."""
    made = {}

    def run(name, layout, other_folder=None):
        if name not in made:
            folder = str(tmp_path_factory.mktemp(name))
            made[name] = Run(folder, on_layout(layout, go_through_a_run, folder, other_folder))
        return made[name]

    def both(name):
        layout = LAYOUTS[name]
        alone = run(f"one_process_{layout.model}", Layout(model=layout.model))
        return run(name, layout, alone.folder), alone

    return both
