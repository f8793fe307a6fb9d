"""Commands that typer cannot make, and a hook that ends the process."""

import sys

from salora_plugins.hookspecs import hookimpl


@hookimpl
def register_commands(app):
    @app.command()
    def unknown_type(value: int | str) -> None:
        """Typer looks at the parameter later."""


@hookimpl
def register_judges(register):
    sys.exit(0)
