"""Settings of every test, and which ones run."""

from hypothesis import settings

# Machines differ and are shared; a slow example is no failure.
settings.register_profile("beam_pipelines", deadline=None)
settings.load_profile("beam_pipelines")


def pytest_addoption(parser):
    parser.addoption(
        "--servers", action="store_true", help="also run the tests that start real servers"
    )


def pytest_ignore_collect(collection_path, config):
    asked = config.getoption("servers") or any("integration" in arg for arg in config.args)
    return True if collection_path.name == "integration" and not asked else None
