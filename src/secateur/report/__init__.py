"""Numbers with their units, conditions and provenance: ``report.json``, and the page and the card drawn from it."""

from secateur.report.card import card
from secateur.report.files import read, redraw, write
from secateur.report.model import (
    Curve,
    CurvePoint,
    Prediction,
    Provenance,
    Report,
    SiteRecord,
    StepRecord,
)
from secateur.report.page import page

__all__ = [
    "Curve",
    "CurvePoint",
    "Prediction",
    "Provenance",
    "Report",
    "SiteRecord",
    "StepRecord",
    "card",
    "page",
    "read",
    "redraw",
    "write",
]
