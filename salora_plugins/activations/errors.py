"""What cannot be calibrated."""

from __future__ import annotations


class CalibrationError(ValueError):
    """Calibration cannot give a meaningful result with this model and data."""
