"""The command line: ``paceline train | check | eval | report | bench | verify | …``.

Heavy libraries are imported inside the commands: ``paceline check`` needs neither torch, Ray nor
vLLM, and ``--help`` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paceline.configs.errors import UserError

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement-learning post-training for language models: asynchronous, never stale.\n\n"
    "Begin with: paceline check quickstart, then: paceline train quickstart",
)

Recipe = Annotated[
    str, typer.Argument(help="YAML file, or the name of a packaged recipe such as `quickstart`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Settings laid over the file, for example `loop.num_steps=50 seed=3`.",
    ),
]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the interrupted run of this name."),
    ] = False,
) -> None:
    """Train a model: warm start, rollouts, learner and report, into `output_dir/name`.

    Ctrl-C stops after the current step and saves; `--resume` continues. Exit codes: 0 finished,
    2 a mistake in the settings or data, 130 interrupted, 1 anything else.

    Example: paceline train quickstart seed=1 name=quickstart-1
    """
    from paceline.configs.imports import imports_uncollected
    from paceline.configs.limits.model_limits import require_usable_models
    from paceline.configs.load import load_config

    config = load_config(recipe, overrides or ())
    require_usable_models(config)  # what is wrong shows before torch is imported

    with imports_uncollected():
        from paceline.controller.observe.files.summary import print_summary
        from paceline.controller.run.run import run_training

    outcome = run_training(config, resume=resume)
    print_summary(outcome.summary, outcome.report)
    if outcome.summary.status == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)
    if outcome.error is not None:
        raise outcome.error


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Validate a configuration and show what it would do: placement, freshness, memory.

    Starts nothing and imports neither torch, Ray nor vLLM.

    Example: paceline check quickstart loop.max_lag=2
    """
    from paceline.configs.limits.model_limits import require_usable_models
    from paceline.configs.load import load_config
    from paceline.controller.run.plan import print_plan

    config = load_config(recipe, overrides or ())
    require_usable_models(config)
    print_plan(config)


@app.command("eval")
def evaluate(
    recipe: Recipe,
    model: Annotated[
        Path, typer.Option(help="Folder of the weights in Hugging Face format, e.g. RUN/final.")
    ],
    overrides: Overrides = None,
) -> None:
    """Measure greedy and T=1 accuracy of a model on a recipe's held-out prompts.

    Example: paceline eval quickstart --model runs/quickstart/final
    """
    from paceline.configs.imports import imports_uncollected
    from paceline.configs.load import load_config

    config = load_config(recipe, overrides or ())

    with imports_uncollected():
        from paceline.controller.run.standalone_evaluation import evaluate_model

    evaluate_model(config, model)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, for example runs/quickstart.")],
) -> None:
    """Write a run's `report.html` anew from the files in its folder, finished or not."""
    from paceline.controller.observe.files.folder import RunFolder
    from paceline.controller.observe.report.report import write_report

    Console().print(str(write_report(RunFolder.open(run))), soft_wrap=True, highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, at most seven.")],
    output: Annotated[Path, typer.Option(help="Where the drawing goes.")] = Path("comparison.svg"),
) -> None:
    """Compare held-out accuracy of several runs by step: a table, and curves in an SVG file."""
    from paceline.controller.observe.report.comparison import compare_runs

    compare_runs(runs, output)


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="A run's folder, for example runs/quickstart.")],
) -> None:
    """Account for every group of a run, going on or over: each trained, dropped or pending.

    Exit code 1 where a group is lost or doubled, or samples that are needed are missing.
    """
    from paceline.controller.run.balance import print_ledger

    if not print_ledger(run):
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def reproduce(
    incident: Annotated[
        Path, typer.Argument(help="What a failed step left, RUN/incidents/step-000012.")
    ],
) -> None:
    """Do a training step again that failed a run, by itself and without writing anything.

    Exit code 2 where it fails again, with what was wrong.
    """
    from paceline.controller.run.incidents import reproduce as do_again

    metrics = do_again(incident).metrics
    Console().print("this time the step can be taken:", dict(metrics))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which measurement, for example `e2e`.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="A rough answer within 90 s, once its model is made.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for what it runs and caches.")] = Path(
        "runs/bench"
    ),
) -> None:
    """Measure Paceline side by side with others; prints a table and, last, one JSON line."""
    from paceline.controller.bench.harness.registry import run_bench

    raise typer.Exit(run_bench(name, quick, output))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="What is verified: `speculation`.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a model in Hugging Face format; a small one is trained else."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another model and other samples.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: a rougher net.")] = False,
) -> None:
    """Prove on this machine that drafting does not change what is sampled: docs/verification.md.

    Prints a table and, last, one JSON line. Exit code 1 where a check fails.
    """
    from paceline.controller.verify.suite import run_verification

    raise typer.Exit(run_verification(name, model=model, seed=seed, quick=quick))


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"paceline: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    main()
