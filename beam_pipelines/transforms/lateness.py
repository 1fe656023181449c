"""Rows are judged by the time rule, and what can't count is set aside."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints import typehints
from apache_beam.typehints.decorators import no_annotations

from beam_pipelines.kernels.dead_letters import dead_letters
from beam_pipelines.kernels.lateness import Judged, judge
from beam_pipelines.model.batches import BatchOf, Rows, encoded, require_columns
from beam_pipelines.model.records import (
    DEAD_LETTERS,
    EVENT_TIME,
    FUTURE,
    LATE,
    ON_TIME,
    PAYLOADS,
    TIMESTAMP,
    TOO_LATE,
    VERDICT,
    VERDICTS,
    append_time_of,
    classified_schema,
    declared_names,
    event_schema,
    timed_schema_of,
)
from beam_pipelines.model.span import Span, batch_hint, spanned
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.telemetry import Counter


class Timed(NamedTuple):
    """Outputs of `ClassifyLateness`.

    `usable` carries the allowed lateness in its type hint, for what follows.
    """

    #                               of pairs                            of plain batches
    classified: beam.PCollection  # (Span, batch of classified_schema)  input and `verdict`
    usable: beam.PCollection  #     batches of event_schema             as the input
    too_late: beam.PCollection  #   batches of DEAD_LETTERS             as the input
    future: beam.PCollection  #     batches of DEAD_LETTERS             as the input


@dataclass
class ClassifyLateness(beam.PTransform):
    """Judge every row by its event time and append time.

    Input: (Span, batch of parsed_schema), as `Parse` yields them; or plain batches whose
    schema marks the column with the time a row was stored (`Batch(…, append_time=COLUMN)`).
    On bounded input it need not, and where it is null the row belongs to complete input:
    nothing but `future` is judged there.
    Output: `Timed`, every row in exactly one of `usable`, `too_late` and `future`. Of pairs,
    `too_late` and `future` are dead letters with their bytes and seconds late; of plain
    batches they are rows of the same schema: send them somewhere. `classified` has all rows
    but the future ones, with their verdict; of pairs every span, rows or none.

    The hint of `usable` says how far behind the watermark a row is at most. The sources of
    this package keep their watermark `out_of_orderness_s` behind the append times of what is
    to come, so it is `allowed_lateness_s`. Other sources, of plain batches, need only keep
    theirs behind these append times: it is the sum of both.

    Args:
      rule: The time rule.

    Raises:
      TypeError: the elements are declared neither as such pairs nor as batches.
      ValueError: a column is missing, a plain batch has a column `verdict`, or unbounded
        plain batches don't say when each row was stored.
    """

    rule: TimeRule

    @no_annotations
    def expand(self, rows: beam.PCollection) -> Timed:
        if isinstance(rows.element_type, typehints.TupleConstraint):
            return self._of_pairs(rows)
        return self._of_batches(rows)

    def _of_pairs(self, rows: beam.PCollection) -> Timed:
        schema = batch_hint(rows).schema
        require_columns(schema, EVENT_TIME, *PAYLOADS.names)
        declared = pa.schema([schema.field(name) for name in declared_names(schema)])
        outputs = rows | "Judge" >> beam.ParDo(_JudgeFn(self.rule, declared)).with_outputs(
            "usable", "too_late", "future", main="classified"
        )
        outputs.classified.element_type = spanned(BatchOf(classified_schema(declared)))
        outputs.usable.element_type = BatchOf(event_schema(declared), self.rule.allowed_lateness_s)
        outputs.too_late.element_type = BatchOf(DEAD_LETTERS)
        outputs.future.element_type = BatchOf(DEAD_LETTERS)
        return Timed(outputs.classified, outputs.usable, outputs.too_late, outputs.future)

    def _of_batches(self, rows: beam.PCollection) -> Timed:
        schema = timed_schema_of(rows)
        if VERDICT.name in schema.names:
            raise ValueError(f"the batches have a column {VERDICT.name!r}, which is the output's")
        append_time = append_time_of(schema)
        if not rows.is_bounded:
            _require_append_time(schema, append_time)
        classified = schema.append(VERDICT)
        outputs = rows | "Judge" >> beam.ParDo(
            _JudgeRowsFn(self.rule, append_time, classified)
        ).with_outputs("usable", "too_late", "future", main="classified")
        outputs.classified.element_type = BatchOf(classified)
        lateness_s = self.rule.out_of_orderness_s + self.rule.allowed_lateness_s
        outputs.usable.element_type = BatchOf(schema, lateness_s)
        outputs.too_late.element_type = BatchOf(schema)
        outputs.future.element_type = BatchOf(schema)
        return Timed(outputs.classified, outputs.usable, outputs.too_late, outputs.future)


def _require_append_time(schema: pa.Schema, append_time: str | None) -> None:
    if append_time is None:
        raise ValueError(
            "nothing tells when rows of unbounded input were stored, so nobody can say how late "
            "they are: name the column with Batch(…, append_time=COLUMN)"
        )
    if schema.field(append_time).nullable:
        raise ValueError(
            f"column {append_time!r} of unbounded input may be null, and a row without a time "
            "at which it was stored can't be judged: declare it with nullable=False"
        )


class _VerdictFn(beam.DoFn):
    """Judges rows, and counts the verdicts."""

    def __init__(self, rule: TimeRule) -> None:
        self.rule = rule
        self.counters = [Counter(name) for name in VERDICTS]

    def judged(self, event_time: pa.Array, append_time: pa.Array) -> tuple[Judged, list[int]]:
        """Return the rows' verdicts, and how many there are of each."""
        judged = judge(event_time, append_time, self.rule)
        counts = np.bincount(judged.verdicts, minlength=len(VERDICTS)).tolist()
        for counter, count in zip(self.counters, counts, strict=True):
            if count:
                counter.inc(count)
        return judged, counts


class _JudgeRowsFn(_VerdictFn):
    def __init__(self, rule: TimeRule, append_time: str | None, classified: pa.Schema) -> None:
        super().__init__(rule)
        self.append_time = append_time
        self.classified = classified

    def process(self, rows: Rows) -> Iterator:
        appended = (
            pa.nulls(len(rows), TIMESTAMP) if self.append_time is None else rows[self.append_time]
        )
        verdicts = self.judged(rows[EVENT_TIME], appended)[0].verdicts
        for tag, chosen in (
            ("usable", (verdicts == ON_TIME) | (verdicts == LATE)),
            ("too_late", verdicts == TOO_LATE),
            ("future", verdicts == FUTURE),
        ):
            if chosen.any():
                yield TaggedOutput(tag, rows.filter(pa.array(chosen)))
        classified = pa.RecordBatch.from_arrays(
            [*rows.columns, encoded(VERDICT, verdicts)], schema=self.classified
        )
        yield classified.filter(pa.array(verdicts != FUTURE))


class _JudgeFn(_VerdictFn):
    def __init__(self, rule: TimeRule, declared: pa.Schema) -> None:
        super().__init__(rule)
        self.classified = classified_schema(declared)
        self.usable = event_schema(declared)

    def process(self, element: tuple[Span, Rows]) -> Iterator:
        span, rows = element
        judged, counts = self.judged(rows[EVENT_TIME], rows["append_time"])
        for code in (TOO_LATE, FUTURE):
            if counts[code]:
                yield TaggedOutput(VERDICTS[code], self._letters(span, rows, judged, code))

        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        columns[VERDICT.name] = encoded(VERDICT, judged.verdicts)
        classified = pa.RecordBatch.from_arrays(
            [columns[name] for name in self.classified.names], schema=self.classified
        )
        if counts[FUTURE]:
            classified = classified.filter(pa.array(judged.verdicts != FUTURE))
        yield span, classified

        if counts[ON_TIME] + counts[LATE]:
            usable = pa.RecordBatch.from_arrays(
                [columns[name] for name in self.usable.names], schema=self.usable
            )
            if counts[TOO_LATE] + counts[FUTURE]:
                counted = (judged.verdicts == ON_TIME) | (judged.verdicts == LATE)
                usable = usable.filter(pa.array(counted))
            yield TaggedOutput("usable", usable)

    def _letters(
        self, span: Span, rows: pa.RecordBatch, judged: Judged, code: int
    ) -> pa.RecordBatch:
        chosen = np.flatnonzero(judged.verdicts == code)
        seconds = judged.seconds_late[chosen]
        if code == FUTURE:
            bound = f"ahead of its append time; {self.rule.future_tolerance_s} s are tolerated"
        else:
            bound = f"behind the watermark; {self.rule.allowed_lateness_s} s are allowed"
        messages = [f"event_time is {abs(late):.3f} s {bound}" for late in seconds.tolist()]
        return dead_letters(
            rows.take(pa.array(chosen)),
            span,
            "lateness",
            [VERDICTS[code]] * len(chosen),
            messages,
            seconds,
        )
