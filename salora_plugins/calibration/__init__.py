"""Calibration: examples -> token batches -> streaming statistics -> a safety module."""

from ..activations.capture import CalibrationError
from ..rows.reading import DataError
from .pipeline import calibrate, calibrate_with, task_bases

__all__ = ["CalibrationError", "DataError", "calibrate", "calibrate_with", "task_bases"]
