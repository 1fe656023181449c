"""A lake is of one input and one set of decisions."""

import json
import threading
from pathlib import Path

import pytest

from beam_pipelines import activity, lake_claim
from beam_pipelines.activity import main
from beam_pipelines.io.lake import lake_files
from beam_pipelines.io.publication import listed, published, stored
from beam_pipelines.lake_claim import LAKE, LakeClaim, LakeMismatch, lake_identity
from tests.io.test_lake_on_object_store import endpoint, folder  # noqa: F401 (fixtures)
from tests.runs import event, lines_of, written

SETTINGS = {
    "format": "auto",
    "fields": {},
    "event_types": {},
    "out_of_orderness_s": 120,
    "allowed_lateness_s": 120,
    "future_tolerance_s": 300,
    "as_of_us": 5,
    "window_s": 60,
    "users_window_s": 300,
    "users_period_s": 60,
    "session_gap_s": 1800,
    "dedupe": "auto",
}
TOPICS = {"topics": ["views"], "start": "earliest", "append_time": "broker"}


def identity(source=TOPICS, **settings):
    return lake_identity(source, {**SETTINGS, **settings}, "ndjson")


def test_the_first_run_claims_the_lake_and_the_same_may_follow(tmp_path):
    for _ in range(2):
        LakeClaim(str(tmp_path), identity()).take()
        assert json.loads((tmp_path / LAKE).read_text()) == identity()
        assert listed(tmp_path) == [LAKE]
    assert lake_files(tmp_path) == []


@pytest.mark.parametrize(
    "follower",
    [
        identity({**TOPICS, "start": "latest"}),
        identity(as_of_us=6),  # topics have append times
        identity(window_s=3600, users_window_s=3600, users_period_s=3600, session_gap_s=60),
    ],
)
def test_what_no_row_of_the_lake_depends_on_may_change(tmp_path, follower):
    LakeClaim(str(tmp_path), identity()).take()
    LakeClaim(str(tmp_path), follower).take()


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (identity({**TOPICS, "topics": ["clicks"]}), 'input.topics was ["views"], is ["clicks"]'),
        (identity({**TOPICS, "append_time": "producer"}), 'append_time was "broker"'),
        (identity({"demo_events": 5, "seed": 1}), "input.demo_events was absent, is 5"),
        (identity(out_of_orderness_s=60), "settings.out_of_orderness_s was 120, is 60"),
        (identity(allowed_lateness_s=60), "settings.allowed_lateness_s was 120, is 60"),
        (identity(future_tolerance_s=60), "settings.future_tolerance_s was 300, is 60"),
        (identity(fields={"user_id": "uid"}), 'settings.fields.user_id was absent, is "uid"'),
        (identity(event_types={"pv": "click"}), "settings.event_types.pv was absent"),
        (identity(dedupe="payload"), 'settings.dedupe was "auto", is "payload"'),
        (identity(hash_key="3f2a"), 'settings.hash_key was absent, is "3f2a"'),
    ],
)
def test_a_run_that_differs_is_refused_and_nothing_is_written(tmp_path, other, difference):
    LakeClaim(str(tmp_path), identity()).take()
    for refused in (LakeClaim(str(tmp_path), other).check, LakeClaim(str(tmp_path), other).take):
        with pytest.raises(LakeMismatch) as why:
            refused()
        assert difference in str(why.value)
    assert json.loads((tmp_path / LAKE).read_text()) == identity()
    assert listed(tmp_path) == [LAKE]


def test_without_append_times_the_time_that_stands_for_now_decides(tmp_path):
    complete = {**TOPICS, "append_time": "none"}
    LakeClaim(str(tmp_path), identity(complete)).take()
    with pytest.raises(LakeMismatch, match="as_of_us was 5, is 6"):
        LakeClaim(str(tmp_path), identity(complete, as_of_us=6)).take()


def test_topics_may_join_and_none_may_leave(tmp_path):
    both = identity({**TOPICS, "topics": ["views", "clicks"]})
    LakeClaim(str(tmp_path), identity()).take()
    LakeClaim(str(tmp_path), both).check()
    assert json.loads((tmp_path / LAKE).read_text()) == identity()
    LakeClaim(str(tmp_path), both).take()
    assert json.loads((tmp_path / LAKE).read_text()) == both
    with pytest.raises(LakeMismatch, match=r'topics was \["clicks", "views"\], is \["views"\]'):
        LakeClaim(str(tmp_path), identity()).take()


def test_files_of_unknown_origin_are_left_alone(tmp_path):
    with published(tmp_path, "event_date=2026-01-05/a.parquet") as path:
        path.write_bytes(b"somebody's")
    with pytest.raises(LakeMismatch, match=r"nobody knows what event_date=2026-01-05/a.parquet"):
        LakeClaim(str(tmp_path), identity()).take()
    assert listed(tmp_path) == ["event_date=2026-01-05/a.parquet"]


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"input": 3}'])
def test_a_file_that_no_run_wrote_is_refused(tmp_path, text):
    (tmp_path / LAKE).write_bytes(text)
    with pytest.raises(LakeMismatch, match=r"_lake.json of --lake=.* was not written by a run"):
        LakeClaim(str(tmp_path), identity()).take()


def test_a_folder_that_can_not_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"--lake=.*file can't be used"):
        LakeClaim(str(tmp_path / "file"), identity()).take()


def test_of_runs_that_begin_at_once_and_differ_one_goes_on(tmp_path, monkeypatch):
    ready = threading.Barrier(8)
    check = LakeClaim._agreed

    def all_at_once(claim):
        found = check(claim)
        if found is None:
            ready.wait(10)  # nobody has claimed it, as all of them see
        return found

    monkeypatch.setattr(LakeClaim, "_agreed", all_at_once)
    passed, refused = [], []

    def begin(number):
        try:
            LakeClaim(str(tmp_path), identity(dedupe=str(number))).take()
            passed.append(str(number))
        except LakeMismatch:
            refused.append(str(number))

    runs = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(passed) == 1
    assert len(refused) == 7
    assert json.loads((tmp_path / LAKE).read_text()) == identity(dedupe=passed[0])


# Runs


def flags(output, lake, *more):
    return [
        f"--input={Path(output).parent / 'in.ndjson'}",
        f"--output={output}",
        f"--lake={lake}",
        *more,
    ]


def test_a_run_on_an_object_store_claims_its_lake(tmp_path, folder, capsys):  # noqa: F811
    written(tmp_path / "in.ndjson", lines_of([event(0), event(5)]))
    assert main(flags(tmp_path / "one", folder)) == 0
    before = {name: stored(folder, name) for name in listed(folder)}
    assert LAKE in before
    capsys.readouterr()
    assert main(flags(tmp_path / "two", folder, "--allowed_lateness_s=60")) == 2
    assert "settings.allowed_lateness_s was 120, is 60; choose" in capsys.readouterr().err
    assert {name: stored(folder, name) for name in listed(folder)} == before
    assert not (tmp_path / "two").exists()
    assert main(flags(tmp_path / "three", folder, "--window_s=30")) == 0
    assert {name: stored(folder, name) for name in listed(folder)} == before


def test_an_overwriting_run_takes_the_lake_of_its_folder_along(tmp_path):
    written(tmp_path / "in.ndjson", lines_of([event(0), event(5)]))
    out = tmp_path / "out"
    assert main(flags(out, out / "lake")) == 0
    assert main(flags(out, out / "lake", "--allowed_lateness_s=60", "--overwrite")) == 0
    claimed = json.loads((out / "lake" / LAKE).read_text())
    assert claimed["settings"]["allowed_lateness_s"] == 60


def test_an_endless_run_may_follow_one_up_to_the_end_if_it_judges_alike(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(activity, "start", lambda *_: 0)
    monkeypatch.setattr(activity.flink, "options_for", lambda *_: [])
    monkeypatch.setattr(activity, "run", lambda *_: {"broken_laws": [], "misread": {}})
    monkeypatch.setenv("DATABASE", "postgresql://a@b/c")
    topics = (
        *("--input=kafka:views", "--kafka_bootstrap_servers=localhost:1"),
        *("--enriched=kafka:enriched", "--dead_letters=kafka:dead"),
        *("--database=env:DATABASE", f"--lake={tmp_path / 'lake'}"),
    )
    endless = (*topics, "--runner=FlinkRunner", "--flink_master=localhost:1")
    assert main([*topics, "--kafka_until_end"]) == 0
    assert main([*endless]) == 0
    assert main([*endless, "--kafka_start=latest"]) == 0
    capsys.readouterr()
    assert main([*endless, "--out_of_orderness_s=60"]) == 2
    assert "settings.out_of_orderness_s was 120, is 60" in capsys.readouterr().err
    assert listed(tmp_path / "lake") == [lake_claim.LAKE]
