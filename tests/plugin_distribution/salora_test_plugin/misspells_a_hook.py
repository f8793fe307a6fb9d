from salora_plugins.hookspecs import hookimpl


@hookimpl
def register_judge(register):
    register("misspelled", lambda request, response: True)
