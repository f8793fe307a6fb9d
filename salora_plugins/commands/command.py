"""The class of the built-in commands."""

from __future__ import annotations

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand

from ..support.hosts import explained, in_use, warn_of_unsupported


class Command(TyperCommand):
    """
    A command in which an option that takes one value may be given only once (click would take the last), and which
    names hosts of other releases than the package is for.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        *_, given = self.make_parser(ctx).parse_args(list(args))
        for parameter, times in Counter(given).items():
            if times > 1 and not parameter.multiple and not getattr(parameter, "is_flag", False):
                raise typer.BadParameter(f"given {times} times. Give it once.", ctx=ctx, param=parameter)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        warn_of_unsupported(*in_use())
        with explained(*in_use()):
            return super().invoke(ctx)
