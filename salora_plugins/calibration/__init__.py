"""Calibration: examples -> token batches -> streaming statistics -> a safety module."""

from .pipeline import calibrate, calibrate_with, task_bases
from .capture import CalibrationError
from .data import DataError

__all__ = ["CalibrationError", "DataError", "calibrate", "calibrate_with", "task_bases"]
