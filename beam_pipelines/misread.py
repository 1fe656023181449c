"""Whether a bounded run understood its input; where it didn't, why and what would help."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from beam_pipelines.config import KAFKA, ActivityConfig, topics
from beam_pipelines.guess import guessed
from beam_pipelines.io.publication import listed
from beam_pipelines.model.records import FUTURE, TOO_LATE, VERDICTS
from beam_pipelines.terminal import printable

_GUESSED_FROM = 50
_SAMPLE_CHARACTERS = 160
_BATCH_RECORDS = 16
_MAX_BYTES_PER_CHARACTER = 4


def judged(config: ActivityConfig, format: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Judge a run that is over, its outputs written, by what `summary` counts.

    It is misread if something was read and nothing accepted, or if the invalid records are
    more than the share `--max_invalid` of those read.

    Args:
      config: The flags.
      format: That the records were read as.
      summary: `read`, `verdicts` and `invalid` (count by reason).

    Returns:
      Nothing where the input was understood. Else, as JSON values: `what` (how many of how
      many), `reason` (the commonest), `records` (that have it) and, as far as the dead
      letters are in a folder or it is known, `message` (which names the field), `sample`
      (topic or file, partition, offset, payload, shortened) and `guess`. All texts are
      printable.
    """
    read, verdicts = summary["read"], summary["verdicts"]
    invalid, accepted = verdicts["invalid"], verdicts["accepted"]
    if not read or (accepted and invalid <= config.max_invalid * read):
        return {}
    late = {VERDICTS[verdict]: verdicts[VERDICTS[verdict]] for verdict in (FUTURE, TOO_LATE)}
    reasons = {**summary["invalid"], **(late if not accepted else {})}
    reason = max(reasons, key=lambda name: reasons[name], default="unknown")
    what = (
        f"{invalid:,} of {read:,} records are invalid, and no more than the share "
        f"--max_invalid={config.max_invalid:g} may be"
        if accepted
        else f"none of {read:,} records was accepted, and {invalid:,} are invalid"
    )
    told: dict[str, Any] = {"what": what, "reason": reason, "records": reasons.get(reason, 0)}
    first: list[bytes] = []
    if not config.dead_letters.startswith(KAFKA):
        first = [row["payload"] or b"" for row in _letters(config.dead_letters, None)]
        told |= _sampled(next(_letters(config.dead_letters, reason), None))
    guess = _of_times(config, reason) or guessed(first, format, config.fields, config.event_types)
    return told | ({"guess": printable(guess)} if guess else {})


def told(config: ActivityConfig, misread: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell of a run that misread its input."""
    yield f"This run can't be used: {misread['what']}."
    yield (
        f"  most often  {misread['reason']} ({misread['records']:,} times)"
        f"{': ' if 'message' in misread else ''}{misread.get('message', '')}"
    )
    if sample := misread.get("sample"):
        place = f"{sample['topic']}, partition {sample['partition']}, offset {sample['offset']}"
        yield f"  a sample    {place}: {sample['payload']}"
    elif config.dead_letters.startswith(KAFKA):
        (topic,) = topics(config.dead_letters)
        yield f"  samples     are in the topic {topic}, each with its reason"
    if "guess" in misread:
        yield f"  a guess     {misread['guess']}"


def _of_times(config: ActivityConfig, reason: str) -> str | None:
    if reason == VERDICTS[FUTURE] and not config.topics:
        return "they are later than now: --as_of=TIME says what stands for now"
    if reason == VERDICTS[TOO_LATE] and config.topics:
        return (
            "they were sent long after they happened: --append_time=none takes the topics for "
            "complete input"
        )
    return None


def _sampled(letter: Mapping[str, Any] | None) -> dict[str, Any]:
    if letter is None:
        return {}
    payload = letter["payload"] or b""
    text = payload[: _SAMPLE_CHARACTERS * _MAX_BYTES_PER_CHARACTER].decode(
        errors="backslashreplace"
    )
    shown = printable(text[:_SAMPLE_CHARACTERS])
    more = f"… ({len(payload):,} bytes)" if len(text) > _SAMPLE_CHARACTERS else ""
    return {
        "message": printable(letter["message"]),
        "sample": {
            "topic": printable(letter["topic"]),
            "partition": letter["partition"],
            "offset": letter["offset"],
            "payload": f"{shown}{more}",
        },
    }


def _letters(folder: str, reason: str | None) -> Iterator[dict[str, Any]]:
    """Yield the first few dead letters, or those from the first one on that has a reason."""
    left = _GUESSED_FROM
    columns = ["payload", "topic", "partition", "offset", "reason", "message"]
    for name in listed(folder):
        with pq.ParquetFile(Path(folder, name)) as file:
            for group in range(file.num_row_groups):
                if reason is not None:  # payloads may be large: first look for one
                    (there,) = file.read_row_group(group, ["reason"]).columns
                    if reason not in there.to_pylist():
                        continue
                for batch in file.iter_batches(_BATCH_RECORDS, [group], columns):
                    for row in batch.to_pylist():
                        if reason is None or row["reason"] == reason:
                            yield row
                            left -= 1
                        if not left:
                            return
