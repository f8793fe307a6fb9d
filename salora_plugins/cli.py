"""The `salora` command. Its subcommands come from plugins, the built-in ones too."""

from __future__ import annotations

import sys

import typer
from typer.core import TyperGroup

from .plugins import call_each_plugin, merge_names, plugin_manager, without_defects
from .support.texts import visible
from .support.version import package_version


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"salora-plugins {package_version()}")
        raise typer.Exit()


def create_cli() -> TyperGroup:
    """The command with the subcommands of all plugins; a name keeps the first command that took it."""
    app = typer.Typer(add_completion=False)

    @app.callback(no_args_is_help=True)
    def salora(
        version: bool = typer.Option(
            False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ) -> None:
        """Fine-tune aligned chat models without losing their refusals."""

    cli = typer.main.get_group(app)
    # Each plugin gets an app of its own, so that one that fails half way leaves nothing behind.
    plugin_app = typer.Typer()

    def clear() -> None:
        plugin_app.registered_commands = []
        plugin_app.registered_groups = []
        plugin_app.registered_callback = None

    manager = plugin_manager(commands_only=True)
    for plugin_name in call_each_plugin(manager, "register_commands", before=clear, app=plugin_app):
        # Only here typer looks at the commands' parameters.
        with without_defects(plugin_name, "failed in register_commands"):
            merge_names(cli.commands, typer.main.get_group(plugin_app).commands, "command", plugin_name)
    return cli


def main() -> None:
    """Run `salora`. An expected error (bad input, a missing file) ends in one line and exit code 1."""
    try:
        create_cli()(prog_name="salora")
    except (ValueError, OSError, ImportError) as error:
        print(f"Error: {' '.join(visible(str(error)).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib's, of ~somebody
            raise
        print("Error: a path begins with ~ and a name, and there is no such user. Write it out.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
