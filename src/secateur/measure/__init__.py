"""Numbers: quality, size and speed of models, beside the dense one."""

from secateur.measure.compare import measure
from secateur.measure.latency import LatencyOptions
from secateur.measure.options import MeasureOptions, Subject
from secateur.measure.types import Comparison, Measurement

__all__ = ["Comparison", "LatencyOptions", "MeasureOptions", "Measurement", "Subject", "measure"]
