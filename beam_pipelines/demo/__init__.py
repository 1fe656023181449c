"""Made-up user activity, with the oddities of real activity and the truth about it."""

from beam_pipelines.demo.payloads import FLAWS
from beam_pipelines.demo.traffic import CHUNK_RECORDS, TRUTH, DemoChunk, DemoTraffic

__all__ = ["CHUNK_RECORDS", "FLAWS", "TRUTH", "DemoChunk", "DemoTraffic"]
