"""What is compared by ``paceline bench rollout``: ways to draft, as settings of an engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.controller.bench.rollout.oracle import SPECULATIVE


@dataclass(frozen=True)
class Mode:
    """A way to draft.

    ``drafting`` are keys of ``rollout.drafting``; ``speculative`` is a configuration of vLLM's own
    instead; with neither nothing is drafted. With ``guesses_noise`` drafts are made as under
    ``rollout.coupled_sampling``. ``replays`` is a mode whose completions it is told beforehand.
    ``needs`` is a module without which it cannot run, and ``package`` what installs it.
    """

    name: str
    drafting: Mapping[str, Any] | None = None
    speculative: Mapping[str, Any] | None = None
    guesses_noise: bool = False
    replays: str | None = None
    needs: str | None = None
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        """True where the module it needs is there."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


PLAIN = Mode("no drafting")
PEER = Mode(
    "vLLM suffix",
    speculative={"method": "suffix"},
    needs="arctic_inference",
    package="'paceline[bench]'",
)
OURS = Mode("ours", drafting={})
UNBUDGETED = Mode("ours, no budgets", drafting={"budget": "none"})
COUPLED = Mode("ours, coupled", drafting={}, guesses_noise=True)
ORACLE = Mode("oracle", speculative=SPECULATIVE, replays=PLAIN.name)
