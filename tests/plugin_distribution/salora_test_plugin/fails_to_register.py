from salora_plugins.hookspecs import hookimpl


@hookimpl
def register_data_sources(register):
    register("left_behind", list)
    raise RuntimeError("a defect of this plugin")


@hookimpl
def register_judges(register):
    register("not callable", "keyword")


@hookimpl
def register_commands(app):
    @app.command()
    def left_behind() -> None:
        """Never reached."""

    raise RuntimeError("a defect of this plugin")
