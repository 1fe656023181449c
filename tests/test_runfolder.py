import json
from hashlib import sha256

import pytest

from beam_pipelines.runfolder import RunFolder, RunMismatch

IDENTITY = {
    "input": {"demo_events": 200},
    "settings": {"window_s": 60, "fields": {}},
    "version": "1",
}
OTHER = {
    "input": {"demo_events": 200},
    "settings": {"window_s": 30, "fields": {"a": "b"}},
    "version": "1",
}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def folder(out, *more):
    return RunFolder(str(out), (f"{out}/a.duckdb", f"{out}/a.duckdb.wal", f"{out}/lake", *more))


def run(out, identity=IDENTITY, overwrite=False, more=()):
    """Begin a run and leave what it would write."""
    run_folder = folder(out, *more)
    run_folder.begin(identity, overwrite=overwrite)
    for path in run_folder.owns:
        if path.endswith(".duckdb"):
            (out / path).write_text("tables")
        elif not path.endswith(".wal"):
            (out / path / "event_date=2026-01-05").mkdir(parents=True, exist_ok=True)
            (out / path / "event_date=2026-01-05" / "x.parquet").write_text("rows")
    run_folder.write_summary({"read": 200})
    return run_folder


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_a_run_leaves_its_identity_and_what_it_owns(out):
    run(out)
    assert names(out) == ["a.duckdb", "lake", "run.json", "summary.json"]
    remembered = json.loads((out / "run.json").read_text())
    assert remembered == {
        "sha256": sha256(json.dumps(IDENTITY, sort_keys=True).encode()).hexdigest(),
        "identity": IDENTITY,
        "owns": ["a.duckdb", "a.duckdb.wal", "lake", "summary.json"],
    }
    assert json.loads((out / "summary.json").read_text()) == {"read": 200}


def test_the_same_run_may_be_repeated_and_keeps_what_is_there(out):
    run(out)
    remembered = (out / "run.json").read_bytes()
    folder(out).begin({key: IDENTITY[key] for key in reversed(IDENTITY)})
    assert json.loads((out / "run.json").read_bytes()) == json.loads(remembered)
    assert (out / "a.duckdb").read_text() == "tables"


def test_a_run_that_crashed_midway_may_be_repeated(out):
    folder(out).begin(IDENTITY)
    (out / "lake").mkdir()
    (out / "lake" / "half.parquet").write_text("")
    folder(out).begin(IDENTITY)


def test_another_run_is_refused_and_told_what_differs(out):
    run(out)
    with pytest.raises(RunMismatch) as refused:
        folder(out).begin(OTHER)
    assert str(refused.value) == (
        f"{out} holds the results of another run: "
        'settings.fields.a was absent, is "b"; settings.window_s was 60, is 30; '
        "choose another --output, or replace them with --overwrite"
    )
    assert (out / "a.duckdb").read_text() == "tables"
    assert json.loads((out / "run.json").read_text())["identity"] == IDENTITY


def test_only_the_first_differences_are_told_and_long_values_cut(out):
    run(out, {f"file{i}": "x" * 100 for i in range(9)})
    with pytest.raises(RunMismatch) as refused:
        folder(out).begin({f"file{i}": "y" for i in range(9)})
    assert f'file4 was "{"x" * 59}…, is "y"; and 4 more; choose' in str(refused.value)


def test_overwriting_removes_what_the_earlier_run_left_and_nothing_else(out):
    run(out)
    (out / "notes.txt").write_text("mine")
    folder(out).begin(OTHER, overwrite=True)
    assert names(out) == ["notes.txt", "run.json"]
    assert json.loads((out / "run.json").read_text())["identity"] == OTHER


def test_overwriting_starts_the_same_run_afresh_too(out):
    run(out)
    folder(out).begin(IDENTITY, overwrite=True)
    assert names(out) == ["run.json"]


def test_overwriting_removes_old_ends_in_the_folder_that_this_run_has_elsewhere(out, tmp_path):
    run(out)
    elsewhere = RunFolder(str(out), (f"{tmp_path}/b.duckdb",))
    elsewhere.begin(OTHER, overwrite=True)
    assert names(out) == ["run.json"]


def test_overwriting_leaves_ends_outside_the_folder_unless_this_run_writes_there(out, tmp_path):
    outside = tmp_path / "outside"
    run(out, more=(str(outside),))
    folder(out).begin(OTHER, overwrite=True)
    assert (outside / "event_date=2026-01-05" / "x.parquet").exists()

    run(tmp_path / "out2", more=(str(tmp_path / "other"),))
    folder(tmp_path / "out2", str(tmp_path / "other")).begin(OTHER, overwrite=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_wrote_is_refused_and_never_removed(out, overwrite):
    (out / "lake").mkdir(parents=True)
    (out / "lake" / "years of work.parquet").write_text("rows")
    with pytest.raises(RunMismatch, match=r"out/lake exists and was written by no run"):
        folder(out).begin(IDENTITY, overwrite=overwrite)
    assert names(out) == ["lake"]
    assert (out / "lake" / "years of work.parquet").exists()


def test_what_no_run_wrote_is_refused_next_to_an_earlier_run(out, tmp_path):
    run(out)
    foreign = tmp_path / "foreign.duckdb"
    foreign.write_text("tables")
    with pytest.raises(RunMismatch, match=r"foreign\.duckdb exists"):
        RunFolder(str(out), (str(foreign),)).begin(IDENTITY, overwrite=True)
    assert foreign.exists()
    assert (out / "a.duckdb").exists()


def test_a_folder_with_other_things_in_it_is_fine(out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "lake").mkdir()  # empty
    run(out)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_may_be_moved_between_runs(out, tmp_path):
    run(out)
    out.rename(tmp_path / "moved")
    folder(tmp_path / "moved").begin(IDENTITY)


def test_a_folder_is_one_under_any_of_its_names(out, tmp_path, monkeypatch):
    run(out)
    monkeypatch.chdir(tmp_path)
    RunFolder("out", ("./out/a.duckdb", "x/../out/lake")).begin(IDENTITY)


def test_a_run_json_of_something_else_is_refused(out):
    out.mkdir()
    (out / "run.json").write_text('{"name": "marathon"}')
    with pytest.raises(RunMismatch, match=r"run.json was not written by a run"):
        folder(out).begin(IDENTITY, overwrite=True)


@pytest.mark.parametrize("inner", ["", "/lake", "/lake/enriched", "/x/..", "/run.json"])
def test_ends_that_lie_in_one_another_are_refused(out, inner):
    with pytest.raises(ValueError, match="can't be written to"):
        folder(out, f"{out}{inner}")


def test_a_summary_replaces_the_earlier_one_whole(out):
    run_folder = run(out)
    run_folder.write_summary({"read": 1, "name": "café"})
    assert (out / "summary.json").read_text() == '{\n  "read": 1,\n  "name": "café"\n}\n'
    assert names(out) == ["a.duckdb", "lake", "run.json", "summary.json"]
