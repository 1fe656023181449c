"""Settings of every test, and which ones run."""

import pytest
from hypothesis import settings

# Machines differ and are shared; a slow example is no failure.
settings.register_profile("beam_pipelines", deadline=None)
settings.load_profile("beam_pipelines")


def pytest_addoption(parser):
    parser.addoption(
        "--servers", action="store_true", help="also run the tests that start real servers"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if _with_servers(config):  # one platform, which is enough for a small machine
        config.option.numprocesses, config.option.dist = None, "no"


def pytest_ignore_collect(collection_path, config):
    left_out = collection_path.name == "integration" and not _with_servers(config)
    return True if left_out else None


def _with_servers(config):
    return config.getoption("servers") or any("integration" in arg for arg in config.args)
