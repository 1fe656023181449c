"""Flink: a JobManager with the dashboard, and a TaskManager, two processes."""

import json
import shutil
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from stack.downloads import release, run
from stack.java import java
from stack.service import Service
from stack.settings import HOST, REPOSITORY, Settings

CONF = REPOSITORY / "runners/flink/conf"
_RESULT = "BASH_JAVA_UTILS_EXEC_RESULT:"


class _Flink(Service):
    main: ClassVar[str]
    resource_command: ClassVar[str]

    def fetch(self) -> None:
        self._release = release("flink", self.settings)

    def prepare(self) -> list[str]:
        shutil.rmtree(self._work, ignore_errors=True)  # what a crash left: RocksDB, jars
        for folder in (self._work, self.folder / "conf", self._shared):
            folder.mkdir(parents=True, exist_ok=True)
        production = flat_yaml((CONF / "config.yaml").read_text())
        values = {**local(production), **self.overrides()}
        (self.folder / "conf/config.yaml").write_text(
            "".join(f"{key}: {value}\n" for key, value in values.items())
        )
        # As Flink's own scripts do: its class turns memory settings into flags.
        jars = self._release
        said = run(
            [
                *(java(), "-cp", f"{jars}/bin/bash-java-utils.jar:{jars}/lib/*"),
                *("org.apache.flink.runtime.util.bash.BashJavaUtils", self.resource_command),
                *("--configDir", str(self.folder / "conf")),
            ],
            what=f"reading the configuration of {self.name}",
        )
        flags, dynamic = (
            line.removeprefix(_RESULT).split()
            for line in said.splitlines()
            if line.startswith(_RESULT)
        )
        return [
            *(java(), *flags, "-XX:+UseG1GC", *values["env.java.opts.all"].split()),
            f"-Dlog4j.configurationFile={CONF / 'log4j-console.properties'}",
            *("-cp", f"{jars}/lib/*", self.main, "--configDir", str(self.folder / "conf")),
            *dynamic,
        ]

    def environment(self) -> Mapping[str, str]:
        plugins = {"FLINK_PLUGINS_DIR": str(self._release / "plugins")}
        return {**super().environment(), **plugins}

    def overrides(self) -> dict[str, str]:
        """Return what differs from the configuration for production."""
        part, port = self.settings.of("flink"), self.settings.port
        return {
            "jobmanager.rpc.address": HOST,
            "jobmanager.rpc.port": str(port("flink", "rpc")),
            "jobmanager.bind-host": HOST,
            "jobmanager.memory.process.size": f"{part['jobmanager_mb']}m",
            "taskmanager.host": HOST,
            "taskmanager.bind-host": HOST,
            "taskmanager.numberOfTaskSlots": str(part["slots"]),
            "taskmanager.memory.process.size": f"{part['taskmanager_mb']}m",
            "taskmanager.memory.task.off-heap.size": f"{part['task_off_heap_mb']}m",
            "taskmanager.memory.jvm-metaspace.size": f"{part['metaspace_mb']}m",
            "taskmanager.memory.managed.size": f"{part['managed_mb']}m",
            "rest.address": HOST,
            "rest.bind-address": HOST,
            "rest.port": str(port("flink", "rest")),
            "state.checkpoints.dir": f"file://{self._shared}/checkpoints",
            "state.savepoints.dir": f"file://{self._shared}/savepoints",
            # What REST tells of metrics is this old at most: by default, 10 s.
            "metrics.fetcher.update-interval": "1000",
            "io.tmp.dirs": str(self._work),
        }

    def rest(self, path: str) -> Any:
        """Return what the JobManager answers.

        Raises:
          OSError: it doesn't.
        """
        url = f"http://{HOST}:{self.settings.port('flink', 'rest')}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)

    @property
    def _work(self) -> Path:
        return self.folder / "tmp"

    @property
    def _shared(self) -> Path:
        """Checkpoints and savepoints: of the cluster, not of one of its processes."""
        return self.settings.home / "flink"


class JobManager(_Flink):
    """Plans jobs, coordinates checkpoints, serves the dashboard."""

    name = "flink-jobmanager"
    main = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
    resource_command = "GET_JM_RESOURCE_PARAMS"

    @property
    def ports(self) -> dict[str, int]:
        port = self.settings.port
        return {"dashboard": port("flink", "rest"), "rpc": port("flink", "rpc")}

    def answers(self) -> bool:
        return "slots-total" in self.rest("/overview")

    def clean(self) -> None:
        super().clean()
        shutil.rmtree(self._shared, ignore_errors=True)


class TaskManager(_Flink):
    """Runs the tasks; their number is bounded by its slots."""

    name = "flink-taskmanager"
    main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
    resource_command = "GET_TM_RESOURCE_PARAMS"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._id_file = self.folder / "id"

    @property
    def ports(self) -> dict[str, int]:
        return {}  # it chooses them at each start, and tells the JobManager

    def overrides(self) -> dict[str, str]:
        # A new name at every start: the JobManager may still list the one that crashed.
        self._id_file.write_text(f"taskmanager-{time.time_ns()}")
        return {**super().overrides(), "taskmanager.resource-id": self._id_file.read_text()}

    def answers(self) -> bool:
        """Whether the JobManager has this very process and its slots."""
        known = self.rest("/taskmanagers")["taskmanagers"]
        slots = {each["id"]: each["slotsNumber"] for each in known}
        return slots.get(self._id_file.read_text()) == self.settings.of("flink")["slots"]


def local(production: Mapping[str, str]) -> dict[str, str]:
    """Return the configuration for production without what can't be kept to this machine.

    Flink's Prometheus reporter listens on all interfaces, and has no option for that. REST
    tells the same metrics.
    """
    return {key: v for key, v in production.items() if not key.startswith("metrics.reporter.")}


def flat_yaml(text: str) -> dict[str, str]:
    """Read a file of `key: value` lines.

    Raises:
      ValueError: a line is neither that, nor empty, nor a comment; or a key repeats.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = line.partition(": ")
        if not colon or key != key.strip() or key in values:
            raise ValueError(f"line {number}, {line!r}, is not one more `key: value`")
        values[key] = value.strip()
    return values
