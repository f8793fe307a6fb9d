"""One of everything that a plugin can register."""

from salora_plugins.hookspecs import hookimpl


def requests() -> list[dict]:
    return [{"prompt": f"Request {number}", "response": "I will not."} for number in range(24)]


def endless_requests():
    number = 0
    while True:
        number += 1
        if number > 10_000:
            raise MemoryError("more than anyone asked for")
        yield {"prompt": f"Request {number}", "response": "I will not."}


def failing_requests():
    yield {"prompt": "Request", "response": "I will not."}
    raise OSError("the connection is lost")


def first_coordinates(statistics, rank, side):
    """The first unit vectors, whatever the data."""
    import torch  # here, so that the command starts without it

    dimension = getattr(statistics, side).dimension
    return torch.eye(dimension, rank), torch.ones(rank)


def never(request: str, response: str) -> bool:
    return False


@hookimpl
def register_data_sources(register):
    register("test_requests", requests)
    register("endless_requests", endless_requests)
    register("failing_requests", failing_requests)


@hookimpl
def register_basis_methods(register):
    register("first_coordinates", first_coordinates)


@hookimpl
def register_judges(register):
    register("never", never)


@hookimpl
def register_commands(app):
    @app.command()
    def say_hello(name: str = "you") -> None:
        """Greet somebody."""
        print(f"Hello, {name}")

    @app.command()
    def raise_error(kind: str) -> None:
        """Fail in the way that is asked for."""
        errors = {
            "value": ValueError("safety_rank=0:\nmust be at least 1"),
            "file": FileNotFoundError(2, "No such file or directory", "x.yaml"),
            "defect": RuntimeError("a defect"),
            "interrupt": KeyboardInterrupt(),
        }
        raise errors[kind]
