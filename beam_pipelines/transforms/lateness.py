"""Rows are judged by the time rule, and what can't count is set aside."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
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
    TOO_LATE,
    VERDICT,
    VERDICTS,
    classified_schema,
    declared_names,
    event_schema,
)
from beam_pipelines.model.span import Span, batch_hint, spanned
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.telemetry import Counter


class Timed(NamedTuple):
    """Outputs of `ClassifyLateness`."""

    classified: beam.PCollection  # (Span, batch of classified_schema): all but `future`
    usable: beam.PCollection  # batches of event_schema: on time and late
    too_late: beam.PCollection  # batches of DEAD_LETTERS
    future: beam.PCollection  # batches of DEAD_LETTERS


@dataclass
class ClassifyLateness(beam.PTransform):
    """Judge every row by its event time and append time.

    Input: (Span, batch of parsed_schema), as `Parse` yields them.
    Output: `Timed`. `classified` has every row but the future ones, with its verdict, and
    every span, rows or none. `usable` has the rows that count. The others are dead
    letters with their bytes and their seconds late.

    Args:
      rule: The time rule.
    """

    rule: TimeRule

    @no_annotations
    def expand(self, rows: beam.PCollection) -> Timed:
        schema = batch_hint(rows).schema
        require_columns(schema, EVENT_TIME, *PAYLOADS.names)
        declared = pa.schema([schema.field(name) for name in declared_names(schema)])
        outputs = rows | "Judge" >> beam.ParDo(_JudgeFn(self.rule, declared)).with_outputs(
            "usable", "too_late", "future", main="classified"
        )
        outputs.classified.element_type = spanned(BatchOf(classified_schema(declared)))
        outputs.usable.element_type = BatchOf(event_schema(declared))
        outputs.too_late.element_type = BatchOf(DEAD_LETTERS)
        outputs.future.element_type = BatchOf(DEAD_LETTERS)
        return Timed(outputs.classified, outputs.usable, outputs.too_late, outputs.future)


class _JudgeFn(beam.DoFn):
    def __init__(self, rule: TimeRule, declared: pa.Schema) -> None:
        self.rule = rule
        self.classified = classified_schema(declared)
        self.usable = event_schema(declared)
        self.counters = [Counter(name) for name in VERDICTS]

    def process(self, element: tuple[Span, Rows]) -> Iterator:
        span, rows = element
        judged = judge(rows[EVENT_TIME], rows["append_time"], self.rule)
        counts = np.bincount(judged.verdicts, minlength=len(VERDICTS)).tolist()
        for counter, count in zip(self.counters, counts, strict=True):
            if count:
                counter.inc(count)
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
