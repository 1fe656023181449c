import duckdb
import pytest

from beam_pipelines.query import main


@pytest.fixture
def database(tmp_path):
    path = str(tmp_path / "results.duckdb")
    with duckdb.connect(path) as connection:
        connection.execute(
            "CREATE TABLE t AS SELECT TIMESTAMPTZ '2026-01-05 10:00:00+01' AS moment"
        )
    return path


def test_a_query_prints_its_rows_in_utc(database, capsys):
    assert main([database, "SELECT moment FROM t"]) == 0
    assert "2026-01-05 09:00:00+00" in capsys.readouterr().out


def test_a_query_can_change_nothing(database, capsys):
    assert main([database, "DELETE FROM t"]) == 1
    assert "read-only" in capsys.readouterr().err


def test_a_mistake_in_sql_is_told(database, capsys):
    assert main([database, "SELECT nothing FROM t"]) == 1
    assert 'column "nothing" not found' in capsys.readouterr().err


def test_a_missing_database_is_told_with_what_makes_it(tmp_path, capsys):
    assert main([str(tmp_path / "none.duckdb"), "SELECT 1"]) == 2
    assert "make demo" in capsys.readouterr().err


def test_misuse_shows_how_it_is_used(capsys):
    assert main([]) == 2
    assert "usage: python -m beam_pipelines.query" in capsys.readouterr().err
