"""Calibration: examples -> token batches -> streaming statistics -> a safety module."""

from .capture import CalibrationError
from .data import DataError
from .pipeline import calibrate, calibrate_with, task_bases

__all__ = ["CalibrationError", "DataError", "calibrate", "calibrate_with", "task_bases"]
