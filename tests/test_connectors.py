import os
import subprocess
import sys

import pytest

from beam_pipelines.connectors import open_source
from beam_pipelines.options import parse


def source_of(*flags):
    return open_source(parse(flags)[0])


@pytest.fixture
def logs(tmp_path):
    line = b'1.2.3.4 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 1\n'
    for number in (1, 2):
        path = tmp_path / f"{number}.log"
        path.write_bytes(line)
        os.utime(path, (1000 * number, 1000 * number))
    return tmp_path


def test_the_demo_brings_its_own_clock_and_length():
    source = source_of("--demo_events=120", "--seed=7")
    assert source.identity == {"demo_events": 120, "seed": 7}
    assert (source.records, source.format) == (120, "ndjson")
    assert source.as_of_us == 1_767_603_600_000_000 + 2_000_000  # two seconds of records


def test_files_are_told_by_what_they_hold_and_judged_as_of_the_newest(logs):
    source = source_of(f"--input={logs}/*.log")
    assert (source.format, source.as_of_us, source.records) == ("access_log", 2_000_000_000, None)
    assert list(source.identity["files"]) == [f"{logs}/1.log", f"{logs}/2.log"]


def test_files_of_several_formats_are_refused(logs):
    (logs / "3.log").write_bytes(b'{"user_id": "a"}\n')
    with pytest.raises(ValueError, match=r"3\.log is ndjson"):
        source_of(f"--input={logs}/*.log")


def test_empty_files_have_every_format(logs):
    (logs / "0.log").write_bytes(b"")
    assert source_of(f"--input={logs}/*.log").format == "access_log"
    assert source_of(f"--input={logs}/0.log").format == "ndjson"


def test_a_format_that_is_named_is_not_questioned(logs):
    assert source_of(f"--input={logs}/*.log", "--format=ndjson").format == "ndjson"


def test_a_topics_reader_knows_the_key_that_its_state_was_made_with(monkeypatch):
    monkeypatch.setenv("KEY", "a key of many bytes")
    config, _ = parse(
        [
            *("--input=kafka:views", "--kafka_bootstrap_servers=b:9092", "--kafka_until_end"),
            "--hash_key=env:KEY",
        ]
    )
    read = open_source(config).read
    assert read.settings == config.state_settings
    assert read.settings.endswith(f"of fingerprint {config.hash_key.fingerprint}")


def test_what_a_run_does_not_use_is_not_imported(logs):
    program = (
        "import sys; from beam_pipelines.connectors import open_source; "
        "from beam_pipelines.options import parse; "
        f"open_source(parse(['--input={logs}/1.log'])[0]); "
        "unused = {'duckdb', 'beam_pipelines.demo', 'beam_pipelines.io.avro_files'}; "
        "print(sorted(unused & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"
