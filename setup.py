"""The package, and what each use of it installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "beam_pipelines/__init__.py").read_text(), re.MULTILINE
)

setup(
    name="beam-pipelines",
    version=VERSION[1],
    description="Apache Beam pipelines whose elements are batches of columns.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["beam_pipelines", "beam_pipelines.*"]),
    package_data={"beam_pipelines": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "apache-beam==2.77.0",
        "duckdb>=1.4",
        "fastavro>=1.9",
        "msgspec>=0.19",
        "numpy>=2.0",
        "orjson>=3.10",
        "pyarrow>=20",
    ],
    extras_require={
        "cassandra": ["cassandra-driver>=3.30"],
        "kafka": ["confluent-kafka>=2.10"],
        "postgres": ["psycopg[binary]>=3.2"],
        "dev": [
            "check-jsonschema",  # knows the schema of compose files
            "hypothesis",
            "import-linter",
            "moto[s3,server]",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "uv",  # renews the lock files
        ],
    },
)
