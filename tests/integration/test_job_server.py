"""The job server that is built here."""

from zipfile import ZipFile

from beam_pipelines.flink import BUILT_JAR

HANDLERS = "org/apache/beam/runners/fnexecution/control/BundleCheckpointHandlers"


def test_what_a_reader_has_left_waits_under_few_ids():
    """Beam's own class draws a new id each time, of which RocksDB makes a column family."""
    with ZipFile(BUILT_JAR) as jar:
        names = [name for name in jar.namelist() if name.startswith(HANDLERS)]
        code = b"".join(jar.read(name) for name in names)
    assert b"sdf_checkpoint" in code
    assert b"IdGenerator" not in code
    assert len(names) == len(set(names))
