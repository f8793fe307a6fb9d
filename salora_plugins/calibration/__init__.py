"""
From safety data to a safety module, and from task data to start values.

`pipeline` is the line; its steps are `settings` (from the configuration and the model), `rows` (read and rendered, with
a digest), `refusals` (the model's own answers, where rows have none), `basis` (directions from the statistics that
`activations` gathers) and `recording` (where it all comes from). `cache` keeps what was calibrated; `sharded`
goes the line where not every process has the weights; `task` is the line of the start values.
"""

from ..activations.errors import CalibrationError
from ..rows.errors import DataError
from .pipeline import calibrate, calibrate_with, directions_of_rows
from .sharded import calibrate_wherever
from .task import task_bases

__all__ = [
    "CalibrationError",
    "DataError",
    "calibrate",
    "calibrate_wherever",
    "calibrate_with",
    "directions_of_rows",
    "task_bases",
]
