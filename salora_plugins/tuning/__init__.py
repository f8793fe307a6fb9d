"""What the tuner is made of: layers, start values, the first batch, state dicts, the choice of a safety module."""
