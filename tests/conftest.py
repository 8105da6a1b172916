"""The environment every test runs in; set before anything imports torch or vLLM."""

import os

from hypothesis import settings

from paceline.rollout.process_environment import engine_environment

os.environ.update(engine_environment(on_gpu=False))

# a busy machine is no failure
settings.register_profile("ci", max_examples=30, deadline=None)
settings.register_profile("nightly", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
