"""What ``paceline check`` shows: placement, freshness, memory; nothing is started."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from paceline.configs.forecast.estimate import Estimate, MemoryEstimate, estimate
from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import AlgorithmConfig, PolicyAlgorithm
from paceline.controller.groups.freshness import freshness_budget


def print_plan(config: RunConfig, console: Console | None = None) -> None:
    """Print what a valid configuration would do."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in plan_rows(config):
        table.add_row(name, value)
    console.print(f"[bold]{config.name}[/bold]  the configuration is valid")
    console.print(table)


def plan_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Name and value of each line of the plan."""
    loop, found = config.loop, estimate(config)
    budget = freshness_budget(loop.groups_per_step, loop.max_lag, loop.window_fraction)
    mode = "synchronous" if loop.max_lag == 0 else "asynchronous"
    model = config.model.path or f"{(config.model.architecture or {}).get('model_type')}, random"
    return [
        ("model", f"{model}, {parameters(found)}, {config.model.precision}"),
        ("run folder", f"{config.output_dir}/{config.name}"),
        ("step", f"{loop.groups_per_step} groups x {loop.samples_per_group} samples"),
        ("algorithm", algorithm_of(config.algorithm)),
        ("steps", f"{loop.num_steps}" + ("" if config.warm_start is None else " + warm start")),
        (
            "freshness",
            f"{mode}: trained tokens are at most {budget.max_age} weight versions old "
            f"({budget.capacity} groups in flight, window {budget.window})",
        ),
        ("rollout workers", placed(config.rollout.num_workers, config.rollout.gpus_per_worker)),
        *teacher_rows(config),
        ("learner ranks", placed(config.learner.num_ranks, config.learner.gpus_per_rank)),
        ("grader processes", str(found.placement.num_grader_processes)),
        (
            "Ray reserves",
            f"{found.placement.cpus:g} CPUs, {found.placement.gpus:g} GPUs in all",
        ),
        ("memory, learner rank", memory(found.learner_rank)),
        *host_rows(found),
        ("memory, engine", memory(found.engine)),
    ]


def algorithm_of(config: AlgorithmConfig) -> str:
    """Return an algorithm's name and the parts it is a choice of."""
    if not isinstance(config, PolicyAlgorithm):
        return config.type
    parts: list[str] = [config.advantage.type, config.loss.type, config.aggregation]
    parts += [f"ratio to the {config.old_policy} policy"]
    parts += [correction.type for correction in config.corrections]
    parts += ["critic"] if config.critic else []
    parts += ["reference"] if config.reference else []
    return f"{config.type} ({', '.join(parts)})"


def teacher_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Return the teacher's line, where there is one."""
    teacher = config.teacher
    if teacher is None:
        return []
    on = placed(teacher.num_workers, teacher.gpus_per_worker)
    return [("teacher workers", f"{on}, {teacher.path}")]


def host_rows(found: Estimate) -> list[tuple[str, str]]:
    """Return the line of a learner rank's host memory, where it computes on a GPU."""
    if found.learner_host is None:
        return []
    return [("memory, its host", memory(found.learner_host))]


def placed(count: int, gpus: float) -> str:
    """Say how many actors there are, and what each runs on."""
    return f"{count} on " + (f"{gpus:g} GPUs each" if gpus else "the CPU")


def parameters(found: Estimate) -> str:
    """Return the parameter count in words."""
    if found.num_parameters is None:
        return "parameters unknown (not a local folder)"
    return f"{found.num_parameters / 1e6:,.2f}M parameters"


def memory(found: MemoryEstimate | None) -> str:
    """Return an estimate with its larger parts."""
    if found is None:
        return "unknown (not a local folder)"
    parts = ", ".join(f"{name} {size_of(size)}" for name, size in found.parts if size >= 1 << 20)
    return f"about {size_of(found.total)} ({parts})"


def size_of(num_bytes: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / (1 << 30):.1f} GiB"
