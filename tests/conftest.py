"""The environment every test runs in; set before anything imports torch or vLLM."""

import os

from paceline.rollout.process_environment import engine_environment

os.environ.update(engine_environment(on_gpu=False))
