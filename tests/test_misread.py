import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.activity import main
from beam_pipelines.guess import guessed
from beam_pipelines.misread import judged, told
from beam_pipelines.options import parse
from tests.runs import event, lines_of, summary, written

EVENTS = [event(second, user=f"u-{second}") for second in range(20)]
FOREIGN = [
    {"ts": e["event_time"], "uid": e["user_id"], "url": e["page_url"], "type": "click"}
    for e in EVENTS
]
CSV = [b"ts,uid,url,type", *(",".join(record.values()).encode() for record in FOREIGN)]


def run(tmp_path, lines, *flags):
    source = written(tmp_path / "in", lines)
    return main([f"--input={source}", f"--output={tmp_path / 'out'}", "--format=ndjson", *flags])


def told_by(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("read ")]


def test_other_field_names_fail_the_run_and_the_flag_it_guesses_mends_it(tmp_path, capsys):
    assert run(tmp_path, lines_of(FOREIGN)) == 1
    assert told_by(capsys) == [
        "This run can't be used: none of 20 records was accepted, and 20 are invalid.",
        "  most often  missing_field (20 times): event_time is missing; it must be an RFC 3339 "
        "text or an integer of milliseconds since 1970",
        f'  a sample    {tmp_path}/in, partition 0, offset 0: {{"ts": '
        '"2026-01-05T09:00:00.000000+00:00", "uid": "u-0", "url": "/a", "type": "click"}',
        "  a guess     the records have ts, uid, url, type: "
        "--fields=event_time=ts,user_id=uid,page_url=url,event_type=type",
    ]
    kept = summary(tmp_path / "out")["misread"]
    assert (kept["reason"], kept["records"]) == ("missing_field", 20)
    assert kept["sample"]["offset"] == 0 and kept["guess"].endswith("event_type=type")

    flag = kept["guess"].rpartition(" ")[2]
    assert run(tmp_path, lines_of(FOREIGN), flag, "--overwrite") == 0
    assert summary(tmp_path / "out")["misread"] == {}
    assert told_by(capsys) == []


def test_a_pretty_printed_array_is_recognised(tmp_path, capsys):
    text = json.dumps(EVENTS, indent=2).encode()
    assert run(tmp_path, text.split(b"\n"), "--format=auto") == 1
    first, _, sample, guess = told_by(capsys)
    assert first.endswith("none of 122 records was accepted, and 122 are invalid.")
    assert sample.endswith("/in, partition 0, offset 0: [")
    assert guess == (
        "  a guess     a JSON array over several lines (pretty-printed), where a record is one "
        "line: jq -c '.[]' FILE > FILE.ndjson"
    )


def test_csv_read_as_ndjson_is_recognised_and_the_command_it_offers_works(tmp_path, capsys):
    assert run(tmp_path, CSV) == 1
    guess = told_by(capsys)[-1]
    assert "CSV with the columns ts, uid, url, type, which isn't read" in guess
    command, flag = re.search(r"as NDJSON: (python .*); then (--fields=\S+)$", guess).groups()
    command = command.replace("python ", f"{sys.executable} ", 1).replace("FILE", "in")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    flags = [f"--input={tmp_path}/in.ndjson", f"--output={tmp_path / 'again'}", flag]
    assert main(flags) == 0
    assert summary(tmp_path / "again")["verdicts"]["accepted"] == 20


@pytest.mark.parametrize(
    ("invalid", "flags", "code"),
    [
        (10, [], 0),
        (11, [], 1),
        (1, ["--max_invalid=0"], 1),
        (0, ["--max_invalid=0"], 0),
        (19, ["--max_invalid=1"], 0),
        (20, ["--max_invalid=1"], 1),  # nothing was accepted
        (5, ["--max_invalid=0.25"], 0),
        (6, ["--max_invalid=0.25"], 1),
    ],
)
def test_a_run_fails_when_more_is_invalid_than_may_be(invalid, flags, code, tmp_path, capsys):
    lines = [b"{}"] * invalid + lines_of(EVENTS[invalid:])
    assert run(tmp_path, lines, *flags) == code
    lines = told_by(capsys)
    assert bool(lines) == bool(code)
    if 0 < invalid < 20 and code:
        assert lines[0].startswith(
            f"This run can't be used: {invalid} of 20 records are invalid, and no more than the "
            "share --max_invalid="
        )


def test_a_run_whose_records_are_all_later_than_now_fails(tmp_path, capsys):
    assert run(tmp_path, lines_of(EVENTS), "--as_of=2026-01-05T08:00:00Z") == 1
    lines = told_by(capsys)
    assert lines[0].endswith("none of 20 records was accepted, and 0 are invalid.")
    assert lines[1].startswith("  most often  future (20 times)")
    assert lines[3] == (
        "  a guess     they are later than now: --as_of=TIME says what stands for now"
    )


def test_input_without_records_is_no_failure(tmp_path, capsys):
    assert run(tmp_path, []) == 0
    assert told_by(capsys) == []


def test_a_sample_is_shortened_and_steers_no_terminal(tmp_path, capsys):
    hostile = b'{"\x1b[2J\x9b\xe2\x80\xae\xff": "' + b"x" * 5_000
    assert run(tmp_path, [hostile] * 3) == 1
    lines = told_by(capsys)
    assert lines[2].endswith("… (5,015 bytes)")
    assert '{"\\x1b[2J\\x9b\\u202e\\xff": "xxx' in lines[2]
    assert all(line.isprintable() and len(line) < 400 for line in lines)


def counted(read=10, accepted=0, invalid=10):
    return {
        "read": read,
        "verdicts": {"accepted": accepted, "invalid": invalid, "future": 0, "too_late": 0},
        "invalid": {"not_json": invalid - 1, "bad_text": 1},
    }


KAFKA = ["--kafka_bootstrap_servers=b:1", "--dead_letters=kafka:dlq", "--kafka_until_end"]


def test_with_dead_letters_in_a_topic_reasons_are_told_and_where_samples_are():
    config, _ = parse(["--input=kafka:clicks", *KAFKA])
    misread = judged(config, "ndjson", counted())
    assert list(told(config, misread)) == [
        "This run can't be used: none of 10 records was accepted, and 10 are invalid.",
        "  most often  not_json (9 times)",
        "  samples     are in the topic dlq, each with its reason",
    ]
    assert judged(config, "ndjson", counted(accepted=5, invalid=5)) == {}
    assert judged(config, "ndjson", counted(read=0, invalid=1)) == {}


def test_a_topic_that_was_filled_late_is_told_how_to_be_read():
    config, _ = parse(["--input=kafka:clicks", *KAFKA])
    late = counted(invalid=1)
    late["verdicts"]["too_late"] = 9
    assert judged(config, "ndjson", late)["guess"] == (
        "they were sent long after they happened: --append_time=none takes the topics for "
        "complete input"
    )
    complete = replace(config, kafka=replace(config.kafka, append_time="none"))
    assert judged(complete, "ndjson", counted())["reason"] == "not_json"


LOG = b'192.0.2.7 - - [05/Jan/2026:10:00:01 +0100] "GET /a HTTP/1.1" 200 512 "-" "curl"'


@pytest.mark.parametrize(
    ("payloads", "format", "words"),
    [
        ([LOG] * 3, "ndjson", "--format=access_log"),
        (lines_of(EVENTS), "access_log", "--format=ndjson"),
        ([json.dumps(EVENTS).encode()], "ndjson", "jq -c '.[]' FILE"),
        (json.dumps(EVENTS[0], indent=1).encode().split(b"\n") * 3, "ndjson", "jq -c '.' FILE"),
        ([b"\xef\xbb\xbfuser_id;page_url", b"u;/", b"v;/"], "ndjson", "columns user_id, page_url"),
        ([b"user_id\tpage_url", b"u\t/"], "access_log", "CSV with the columns user_id, page_url"),
        (
            lines_of([event(0, kind="pageview"), event(0, kind="Log-Out"), event(0, kind="buy")]),
            "ndjson",
            "--event_types=pageview=page_view,Log-Out=session_end",
        ),
        (lines_of([event(0, kind="buy")]), "ndjson", "--event_types=THEIRS=OURS"),
        (lines_of([{"time": 1, "userId": "u", "event": "x"}]), "ndjson", "page_url=FIELD"),
    ],
)
def test_what_would_help_is_guessed(payloads, format, words):
    assert words in guessed(payloads, format, {}, {})


@pytest.mark.parametrize("payloads", [[], [b""], [b"\xff\xfe"], lines_of(EVENTS), [b"prose"]])
def test_without_an_idea_nothing_is_guessed(payloads):
    assert guessed(payloads, "ndjson", {}, {}) is None


def test_fields_that_were_told_stay_and_names_that_a_shell_would_run_are_quoted(tmp_path):
    records = [{"at": 1, "user; touch x": "u", "url,b": "/", "what": "click"}]
    guess = guessed(lines_of(records), "ndjson", {"event_type": "what"}, {})
    _, _, flag = guess.partition(": ")
    assert flag == "--fields=event_type=what,event_time=at,user_id=FIELD,page_url=FIELD"
    named = guessed(lines_of([{"ts": 1, "user_id ": "u", "user-id$(x)": 1}]), "ndjson", {}, {})
    assert "'--fields=event_time=ts,user_id=user-id$(x),page_url=FIELD,event_type=FIELD'" in named


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b'{"a":1}', b"[", b"a,b", LOG])))
def test_whatever_the_records_are_guessing_fails_on_none(payloads):
    for format in ("ndjson", "access_log", "avro"):
        guessed(payloads, format, {}, {})
