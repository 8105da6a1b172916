"""A run as the command line starts it: folder, cluster, session, summary, report."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.configs.errors import ConfigError, RunInterrupted, UserError
from paceline.configs.limits.model_limits import require_usable_models
from paceline.configs.load import dump_config, load_config
from paceline.configs.schema import RunConfig
from paceline.controller.cluster.ray_cluster import ray_cluster, require_resources
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.opening import open_store
from paceline.controller.ledger.store import Store
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.recorder import RunRecorder, log_to
from paceline.controller.observe.files.records import standard_error
from paceline.controller.observe.files.summary import RunStatus, RunSummary
from paceline.controller.observe.files.versions import collect_versions, command_line
from paceline.controller.observe.report.report import write_report
from paceline.controller.observe.view.state import RunPlan
from paceline.controller.observe.view.view import open_view
from paceline.controller.run.checkpoints import LEARNER, CheckpointFolder, RunState
from paceline.controller.run.metering import RunTotals
from paceline.controller.run.progress import RunProgress
from paceline.controller.run.recovery import groups_fit
from paceline.controller.run.session import Resumption, Session
from paceline.controller.wiring.preparation import RunInputs, prepare, require_loadable
from paceline.controller.wiring.services import started_services

RESUME_STEP_OF_NOTHING = -1
FIXED_SECTIONS = ("seed", "model", "data", "warm_start")
"""What may not change when a run is resumed; everything else may, the number of steps above all."""


@dataclass(frozen=True)
class RunOutcome:
    """The end of a run: its summary, its report, and the error if it failed."""

    summary: RunSummary
    report: Path
    error: BaseException | None = None


def run_training(config: RunConfig, *, resume: bool) -> RunOutcome:
    """Run a configuration to its end, or continue the interrupted run of its name.

    Whatever ends it, the folder is left whole, with a summary and a report of what was done.

    Raises:
        UserError: the folder cannot be used; nothing was written then.
    """
    require_usable_models(config)
    root = Path(config.output_dir) / config.name
    folder = RunFolder.open(root) if resume else RunFolder.create(root)
    checkpoint = CheckpointFolder(folder.checkpoints, config.checkpoint.keep).latest()
    progress, fits = RunProgress(), True
    if resume:
        previous = require_same_run(folder, config)
        if checkpoint is not None:
            require_loadable(config, checkpoint[1] / LEARNER, folder.initial)
        keep_previous_config(folder, previous, config)
        fits = groups_fit(previous, config)
        progress = restored_progress(folder, checkpoint[0] if checkpoint else None)
    folder.write_config(dump_config(config))
    versions = collect_versions(config.seed)
    folder.write_versions(versions)
    view = open_view(RunPlan.from_config(config), config.observability.live, folder.log)
    status: RunStatus = "failed"
    error: BaseException | None = None
    with RunRecorder(folder, view, config.observability.tensorboard) as recorder:
        try:
            recorder.message("preparing prompts, tokenizer and initial model")
            inputs = prepare(config, folder.initial)
            resumption = checkpoint and Resumption(*checkpoint, fits)
            with contextlib.closing(open_store(config.store, folder.root, config.name)) as store:
                journal = Journal(store, revocable=is_revocable(store, config))
                recorder.message("starting Ray, grader, learner and rollout workers")
                with log_to(recorder), ray_cluster(config.cluster):
                    require_resources(config)
                    work = conduct(config, inputs, folder, recorder, progress, journal, resumption)
                    asyncio.run(work)
            status = "solved" if progress.solved else "finished"
        except (RunInterrupted, KeyboardInterrupt) as interruption:
            status, error = "interrupted", interruption
        except Exception as failure:
            error = failure
            recorder.message(f"failed: {error_line(failure)}")
    summary = summarise(config, progress, status, versions, error)
    summary.write(folder)
    return RunOutcome(summary, write_report(folder), error)


async def conduct(
    config: RunConfig,
    inputs: RunInputs,
    folder: RunFolder,
    recorder: RunRecorder,
    progress: RunProgress,
    journal: Journal,
    resumption: Resumption | None,
) -> None:
    """Start the services and run the session; Ctrl-C and SIGTERM end it after the step."""
    stop = asyncio.Event()
    me = asyncio.current_task()
    assert me is not None

    def request_stop() -> None:
        if stop.is_set():
            me.cancel()  # asked twice: do not even finish the step
            return
        recorder.message("stopping after this step; once more to stop at once")
        stop.set()

    event_loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        event_loop.add_signal_handler(number, request_stop)
    try:
        async with started_services(config, inputs) as services:
            progress.enter("other")
            if stop.is_set():
                raise RunInterrupted
            session = Session(services, folder, recorder, progress, journal, stop)
            await session.run(resumption)
    except asyncio.CancelledError:
        raise RunInterrupted from None
    finally:
        await journal.flush()
        for number in (signal.SIGINT, signal.SIGTERM):
            event_loop.remove_signal_handler(number)


def is_revocable(store: Store, config: RunConfig) -> bool:
    """Return whether steps may be done again: by checkpoints and a ledger that outlives the run."""
    return store.survives and config.checkpoint.every_steps is not None


def require_same_run(folder: RunFolder, config: RunConfig) -> RunConfig:
    """Refuse to resume another run; returns the configuration that this one was run with before.

    Raises:
        ConfigError: what the run is made of changed.
    """
    previous = load_config(folder.config)
    changed = [name for name in FIXED_SECTIONS if getattr(previous, name) != getattr(config, name)]
    if changed:
        raise ConfigError(
            f"--resume: {', '.join(changed)} differ from {folder.config}: resume with the same, or "
            "start a new run under another name"
        )
    return previous


def keep_previous_config(folder: RunFolder, previous: RunConfig, config: RunConfig) -> None:
    """Keep a copy of a configuration that a resumed run replaces."""
    if previous != config:
        number = len(list(folder.root.glob("config.*.yaml"))) + 1
        shutil.copyfile(folder.config, folder.config.with_name(f"config.{number}.yaml"))


def restored_progress(folder: RunFolder, state: RunState | None) -> RunProgress:
    """Return what a resumed run knows, with its records cut back to the checkpoint."""
    if state is None:
        folder.rewind("warm_start", RESUME_STEP_OF_NOTHING)
        return RunProgress()
    folder.rewind("train", state.step)
    return RunProgress(
        totals=RunTotals.from_dict(state.totals),
        seconds=dict(state.seconds),
        before=state.before,
        warm_start=state.warm_start,
        step=state.step,
    )


def summarise(
    config: RunConfig,
    progress: RunProgress,
    status: RunStatus,
    versions: dict[str, Any],
    error: BaseException | None,
) -> RunSummary:
    """Return the outcome on one page."""
    progress.settle()
    totals, before, after = progress.totals, progress.before, progress.after
    accuracies = {
        f"{kind}_{when}": found.get(kind)
        for kind in ("greedy", "sampled")
        for when, found in (("before", before), ("after", after))
    }
    num_held_out = config.data.num_held_out
    seconds = {name: round(value, 2) for name, value in progress.seconds.items()}
    dropped = dict(totals.groups_dropped)
    return RunSummary(
        name=config.name,
        status=status,
        seeds={"run": config.seed, "data": config.data.seed},
        steps=progress.step,
        num_held_out=num_held_out,
        max_lag=config.loop.max_lag,
        max_age=totals.max_age,
        **accuracies,
        standard_errors={
            name: standard_error(value, num_held_out)
            for name, value in accuracies.items()
            if value is not None
        },
        wall_seconds={"total": round(sum(progress.seconds.values()), 2), **seconds},
        tokens={
            "prompt": totals.prompt_tokens,
            "completion": totals.completion_tokens,
            "trained": totals.trained_tokens,
        },
        groups={
            "generated": totals.groups_trained + sum(dropped.values()),
            "trained": totals.groups_trained,
            "dropped": dropped,
        },
        warm_start=progress.warm_start,
        versions=versions,
        command=command_line(sys.argv),
        error=error_line(error) if status == "failed" and error is not None else None,
    )


def error_line(error: BaseException) -> str:
    """Return an error as one line: a user's by its message, any other with its type.

    What failed inside an actor arrives wrapped, with its whole traceback as the message.
    """
    error = getattr(error, "cause", None) or error
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
