"""PTransforms over batches of columns, for any Beam pipeline.

`Batch` makes batches of dicts or Rows, `Unbatch` undoes it. Between them, in a global
window: `Deduplicate`, `FilterRows`, `CountPerWindow`, `CountDistinctPerWindow`,
`Sessionize`. Before them: `ClassifyLateness` by a `TimeRule`, and for records as a source
yields them, `Parse`.
"""

from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.model.windows import WindowPolicy
from beam_pipelines.transforms.aggregate import CountDistinctPerWindow, CountPerWindow
from beam_pipelines.transforms.batching import Batch, Unbatch
from beam_pipelines.transforms.dedupe import AcceptAll, Deduplicate
from beam_pipelines.transforms.lateness import ClassifyLateness
from beam_pipelines.transforms.parse import Parse
from beam_pipelines.transforms.rows import FilterRows
from beam_pipelines.transforms.sessions import Sessionize

__all__ = [
    "AcceptAll",
    "Batch",
    "ClassifyLateness",
    "CountDistinctPerWindow",
    "CountPerWindow",
    "Deduplicate",
    "FilterRows",
    "Parse",
    "Sessionize",
    "TimeRule",
    "Unbatch",
    "WindowPolicy",
]
