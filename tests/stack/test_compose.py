"""What Docker runs is what `python -m stack` runs: one file of versions for both."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from beam_pipelines.options import parse
from stack.cassandra import ALONE, CONTAINER_YAML, container_yaml, node_yaml
from stack.flink import flat_yaml
from stack.kafka import broker_properties
from stack.settings import Settings, versions

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
COMPOSE = YAML(typ="safe").load(FILE)
SERVICES = COMPOSE["services"]
VERSIONS = versions()
TOOLS = {name for name, service in SERVICES.items() if "profiles" in service}
DOCKERFILES = [ROOT / f"runners/flink/{name}.Dockerfile" for name in ("flink", "pipeline")]

# Settings that follow from where a broker runs.
OF_THE_PLACE = {
    "advertised.listeners",
    "controller.quorum.voters",
    "listener.security.protocol.map",
    "listeners",
    "log.dirs",
}

OF_THE_NODES_PLACE = {
    "listen_address",
    "rpc_address",
    "storage_port",
    "ssl_storage_port",
    "native_transport_port",
    "seed_provider",
    "data_file_directories",
    "commitlog_directory",
    "saved_caches_directory",
    "hints_directory",
    "cdc_raw_directory",
}


def published(service):
    """Return host port → container port."""
    pairs = [each.rsplit(":", 2) for each in SERVICES[service].get("ports", ())]
    assert all(host == "127.0.0.1" for host, _, _ in pairs)
    return {int(outside): int(inside) for _, outside, inside in pairs}


def test_the_file_is_one_of_compose():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("service", "image"),
    [
        ("kafka", f"apache/kafka:{VERSIONS['kafka']['version']}"),
        ("topics", f"apache/kafka:{VERSIONS['kafka']['version']}"),
        ("postgres", f"postgres:{VERSIONS['postgres']['version']}"),
        ("cassandra", f"cassandra:{VERSIONS['cassandra']['version']}"),
        ("cassandra-tables", f"cassandra:{VERSIONS['cassandra']['version']}"),
        ("jobmanager", f"beam_pipelines/flink:{VERSIONS['flink']['version']}"),
        ("taskmanager", f"beam_pipelines/flink:{VERSIONS['flink']['version']}"),
    ],
)
def test_versions_are_those_of_the_stack(service, image):
    assert SERVICES[service]["image"] == image


def test_flink_is_built_for_its_version_and_java():
    version, java = VERSIONS["flink"]["version"], VERSIONS["java"]["version"]
    flink, pipeline = (path.read_text() for path in DOCKERFILES)
    assert f"FROM flink:{version}-java{java}\n" in flink
    assert f"FROM eclipse-temurin:{java}-jre AS java\n" in pipeline
    line = version.rpartition(".")[0]
    assert f"<flink.line>{line}</flink.line>" in (ROOT / "runners/flink/pom.xml").read_text()


def test_this_machine_finds_everything_at_the_ports_of_the_stack():
    ports = {part: VERSIONS[part]["ports"] for part in ("kafka", "postgres", "cassandra", "flink")}
    assert published("kafka") == {ports["kafka"]["broker"]: 29092}
    assert published("postgres") == {ports["postgres"]["sql"]: 5432}
    assert published("cassandra") == {ports["cassandra"]["native"]: 9042}
    assert published("jobmanager") == {
        ports["flink"]["rest"]: 8081,
        VERSIONS["flink"]["compose_ports"]["prometheus_jobmanager"]: 9249,
    }
    prometheus = VERSIONS["flink"]["compose_ports"]["prometheus_taskmanager"]
    assert published("taskmanager") == {prometheus: 9249}
    advertised = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"HOST://127.0.0.1:{ports['kafka']['broker']}" in advertised.split(",")


def test_the_broker_has_the_settings_of_the_stack():
    text = broker_properties({"broker": 1, "controller": 2}, Path("data"))
    lines = [line.split("=", 1) for line in text.splitlines() if not line.startswith("#")]
    expected = {name: value for name, value in lines if name not in OF_THE_PLACE}
    given = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
        for name, value in SERVICES["kafka"]["environment"].items()
        if name.startswith("KAFKA_") and name != "KAFKA_HEAP_OPTS"
    }
    assert {name: given[name] for name in given if name not in OF_THE_PLACE} == expected
    heap = f"{VERSIONS['kafka']['heap_mb']}m"
    assert SERVICES["kafka"]["environment"]["KAFKA_HEAP_OPTS"] == f"-Xms{heap} -Xmx{heap}"


def test_topics_are_created_as_the_stack_does_it():
    part, service = VERSIONS["kafka"], SERVICES["topics"]
    assert service["environment"]["TOPICS"].split() == part["topics"]
    shell, flags, script = service["command"]
    said = script.replace("$$", "$").replace("/opt/kafka/bin/kafka-topics.sh", "echo")
    done = subprocess.run(
        [shell, flags, said], env=service["environment"], capture_output=True, text=True, check=True
    )
    config = " ".join(f"--config {name}={value}" for name, value in part["topic_config"].items())
    assert done.stdout.splitlines() == [
        f"--bootstrap-server kafka:9092 --create --if-not-exists --topic {topic} "
        f"--partitions {part['partitions']} {config}"
        for topic in part["topics"]
    ]


def test_the_databases_have_the_names_and_memory_of_the_stack():
    postgres, cassandra = VERSIONS["postgres"], VERSIONS["cassandra"]
    assert SERVICES["postgres"]["environment"] == {
        "POSTGRES_DB": postgres["database"],
        "POSTGRES_USER": postgres["user"],
        "POSTGRES_PASSWORD": "${POSTGRES_PASSWORD:-activity}",
    }
    assert (
        SERVICES["postgres"]["command"]
        == f"postgres -c shared_buffers={postgres['shared_buffers_mb']}MB "
        f"-c max_wal_size={postgres['max_wal_mb']}MB"
    )
    assert SERVICES["cassandra"]["environment"]["MAX_HEAP_SIZE"] == f"{cassandra['heap_mb']}M"
    assert f" {cassandra['keyspace']}\n" in (ROOT / "sql/cassandra.cql").read_text()


def mounted(service):
    """Return the files of the repository that a service sees: path in it → file."""
    pairs = [each.split(":") for each in SERVICES[service]["volumes"] if each.startswith("./")]
    return {inside: ROOT / source for source, inside, _ in pairs}


def test_cassandra_is_configured_as_the_stack_does_it_but_for_its_place():
    options = SERVICES["cassandra"]["environment"]["JVM_EXTRA_OPTS"].split()
    own = "-Dcassandra.config=file://"
    assert set(options) - {each for each in options if each.startswith(own)} == set(ALONE)
    (path,) = [each.removeprefix(own) for each in options if each.startswith(own)]
    assert mounted("cassandra")[path] == CONTAINER_YAML
    read = YAML(typ="safe").load
    heap_mb = VERSIONS["cassandra"]["heap_mb"]
    here = read(node_yaml(VERSIONS["cassandra"]["ports"], Path("/stack"), heap_mb))
    there = read(CONTAINER_YAML)
    assert there["commitlog_sync"] == "batch"
    differing = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    assert differing <= OF_THE_NODES_PLACE
    assert {there[f"{kind}_address"] for kind in ("listen", "rpc")} == {"cassandra"}
    assert there["native_transport_port"] == 9042
    folders = [there["commitlog_directory"], *there["data_file_directories"]]
    assert all(folder.startswith("/var/lib/cassandra/") for folder in folders)
    assert CONTAINER_YAML.read_text() == container_yaml()


def test_each_image_is_built_by_one_service_and_pulled_by_none():
    images = {
        service["image"] for service in SERVICES.values() if "beam_pipelines" in service["image"]
    }
    for image in images:
        users = [each for each in SERVICES.values() if each["image"] == image]
        builders = [each for each in users if "build" in each]
        assert len(builders) == 1, image
        others = [each for each in users if each not in builders]
        assert {each["pull_policy"] for each in others} <= {"never"}
    assert len(images) == len(DOCKERFILES)


def test_flink_has_the_memory_and_slots_of_the_stack():
    part = VERSIONS["flink"]
    config = flat_yaml((ROOT / "runners/flink/conf/config.yaml").read_text())

    def mb(name):
        number, unit = re.fullmatch(r"(\d+)([mg])", config[name]).groups()
        return int(number) * {"m": 1, "g": 1024}[unit]

    assert int(config["taskmanager.numberOfTaskSlots"]) == part["slots"]
    assert mb("jobmanager.memory.process.size") == part["jobmanager_mb"]
    assert mb("taskmanager.memory.process.size") == part["taskmanager_mb"]
    assert mb("taskmanager.memory.task.off-heap.size") == part["task_off_heap_mb"]
    assert mb("taskmanager.memory.jvm-metaspace.size") == part["metaspace_mb"]
    assert mb("taskmanager.memory.managed.size") == part["managed_mb"]
    assert config["jobmanager.rpc.address"] == config["rest.address"] == "jobmanager"
    folders = {config[f"state.{kind}.dir"] for kind in ("checkpoints", "savepoints")}
    mounted = {f"file://{each.split(':')[1]}" for each in SERVICES["taskmanager"]["volumes"]}
    assert mounted == folders


def test_programs_are_told_where_everything_is_by_the_stacks_names():
    environment = SERVICES["workers"]["environment"]
    settings = Settings(Path("/home"), Path("/cache"))
    assert environment.keys() == settings.environment().keys()
    assert all(SERVICES[name]["environment"] == environment for name in TOOLS)
    inside = {
        "KAFKA_BOOTSTRAP_SERVERS": "kafka:9092",
        "ACTIVITY_DATABASE_URL": "postgresql://activity:${POSTGRES_PASSWORD:-activity}"
        "@postgres:5432/activity",
        "CASSANDRA": "cassandra:9042/activity",
        "FLINK_MASTER": "jobmanager:8081",
        "BEAM_WORKER_POOL": f"127.0.0.1:{VERSIONS['workers']['ports']['pool']}",
        "LAKE": "/lake",
    }
    assert environment == inside
    assert SERVICES["workers"]["command"].endswith(inside["BEAM_WORKER_POOL"].replace(":", " "))


def test_the_job_is_started_with_flags_that_it_knows(monkeypatch):
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
    python, m, module, *flags = SERVICES["activity"]["command"]
    assert (python, m, module) == ("python", "-m", "beam_pipelines.activity")
    config, _ = parse(flags)
    topics = VERSIONS["kafka"]["topics"]
    places = (config.input, config.enriched, config.dead_letters)
    assert places == tuple(f"kafka:{topic}" for topic in topics)
    assert (config.lake, config.database) == ("/lake", "env:ACTIVITY_DATABASE_URL")
    assert config.cassandra.cluster == SERVICES["workers"]["environment"]["CASSANDRA"]


def test_everything_that_is_waited_for_can_be():
    waited = [
        (name, each["condition"])
        for service in SERVICES.values()
        for name, each in service.get("depends_on", {}).items()
    ]
    for name, condition in waited:
        if condition == "service_healthy":
            assert SERVICES[name]["healthcheck"]["test"], name
    # `up --wait` takes a service that ended for a failure, unless somebody waits for its end.
    ended = {name for name, each in waited if each == "service_completed_successfully"}
    assert ended == {"topics", "cassandra-tables"}
    running = SERVICES.keys() - ended - TOOLS
    assert {name for name in running if "healthcheck" in SERVICES[name]} == running
    assert {name for name in running if SERVICES[name]["restart"] == "unless-stopped"} == running


def test_workers_share_the_network_of_the_taskmanager():
    pipeline = {"workers", *TOOLS}
    assert {SERVICES[name]["network_mode"] for name in pipeline} == {"service:taskmanager"}
    assert {SERVICES[name]["image"] for name in pipeline} == {SERVICES["workers"]["image"]}


def test_the_pipelines_image_is_of_their_version():
    initial = (ROOT / "beam_pipelines/__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', initial, re.MULTILINE)
    image = f"beam_pipelines/pipeline:{version}"
    assert SERVICES["workers"]["image"] == image
    assert f"--tag {image} ." in DOCKERFILES[1].read_text()


def test_what_is_mounted_and_copied_is_there_and_not_ignored():
    mounted = [
        each.split(":")[0].removeprefix("./")
        for service in SERVICES.values()
        for each in service.get("volumes", ())
        if each.startswith(".")
    ]
    copied = [
        source
        for path in DOCKERFILES
        for line in path.read_text().splitlines()
        if re.match(r"COPY (?!--from)", line)
        for source in [each for each in line.split()[1:-1] if not each.startswith("--")]
    ]
    assert len(mounted) >= 2 and len(copied) >= 8
    assert [each for each in {*mounted, *copied} if not (ROOT / each).exists()] == []
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for source in copied:
        assert any(source.rstrip("/").startswith(each) for each in allowed), source


def test_every_variable_is_in_the_example_and_in_the_docs():
    code = "".join(path.read_text() for path in (ROOT / "stack").glob("*.py"))
    own = set(re.findall(r'"(STACK_[A-Z_]+|POSTGRES_PASSWORD)"', code))
    names = own | Settings(Path("/home"), Path("/cache")).environment().keys()
    assert len(names) == 11
    example = re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert names - set(example) == set()
    assert len(example) == len(set(example))
    table = re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE)
    assert set(table) == set(example)
