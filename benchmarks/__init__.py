"""What the project has measured, and how: each module is a command, run as `python -m benchmarks.NAME`."""
