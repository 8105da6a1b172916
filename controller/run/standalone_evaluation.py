"""``paceline eval``: accuracy of saved weights, by the same engine and grader as in training."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console

from paceline.configs.errors import ModelError
from paceline.configs.schema import RunConfig
from paceline.controller.cluster.ray_cluster import ray_cluster
from paceline.controller.groups.evaluation import accuracy
from paceline.controller.observe.files.records import standard_error
from paceline.controller.wiring.preparation import prepare
from paceline.controller.wiring.services import started_services


def evaluate_model(config: RunConfig, model_folder: Path) -> dict[str, float]:
    """Print and return greedy and T=1 accuracy on the recipe's held-out prompts.

    Raises:
        ModelError: there are no weights in the folder.
    """
    if not (model_folder / "config.json").is_file():
        raise ModelError(
            f"{model_folder} holds no config.json, expected a folder in Hugging Face format, for "
            "example runs/quickstart/final"
        )
    model = config.model.model_copy(update={"path": str(model_folder), "architecture": None})
    found = asyncio.run(measure(config.model_copy(update={"model": model})))
    console = Console()
    for name, value in found.items():
        error = standard_error(value, config.data.num_held_out)
        console.print(f"held-out {name:8} {value:.1%} ±{error:.1%}  ({config.data.num_held_out})")
    return found


async def measure(config: RunConfig) -> dict[str, float]:
    """Return both accuracies of the configured model."""
    inputs = prepare(config, Path(config.model.path or ""))
    with ray_cluster(config.cluster):
        async with started_services(config, inputs) as services:
            await services.weights.push(await services.weights.publish(0))
            evaluator, prompts = services.evaluator(), inputs.prompts.held_out
            checked = await services.self_check("saved weights")
            Console().print(f"self-check: {checked} greedy tokens of vLLM equal transformers'")
            return {
                "greedy": accuracy(await evaluator.greedy(prompts)),
                "T=1": accuracy(await evaluator.sampled(prompts)),
            }
