"""The built-in prompt sets, written for this project."""
