"""Settings of every test."""

from hypothesis import settings

# Machines differ and are shared; a slow example is no failure.
settings.register_profile("beam_pipelines", deadline=None)
settings.load_profile("beam_pipelines")
