"""A plugin that works, and others that fail in the ways that plugins do."""
