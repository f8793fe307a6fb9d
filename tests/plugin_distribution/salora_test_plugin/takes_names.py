from salora_plugins.hookspecs import hookimpl


@hookimpl(trylast=True)
def register_data_sources(register):
    register("builtin", list)
    register("another_source", list)


@hookimpl
def register_commands(app):
    @app.command()
    def demo() -> None:
        """Not the demo."""
