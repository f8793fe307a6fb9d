"""
Arguments of host functions that are running now.

PEFT hands a tuner its configuration and the weights to load, not the trainer's tokenizer nor the folder that the
weights come from. Both decide what is right, and both are arguments of a function further up the call stack. Reading
them there changes nothing in the host; where they are not found, the caller of this module does without or says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def argument_of_caller(parameter: str, function: str, accepts: Callable[[Mapping[str, Any]], bool]) -> Any:
    """
    The present value of a local variable, such as an argument, of the nearest caller that fits; None if there is none.

    Args:
        parameter: Name of the variable.
        function: Name of the calling function, such as "load_adapter".
        accepts: Called with the caller's local variables, to tell it from others of that name.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            if frame.f_code.co_name == function and parameter in frame.f_locals and accepts(frame.f_locals):
                return frame.f_locals[parameter]
            frame = frame.f_back
        return None
    finally:
        del frame  # a reference cycle otherwise, which keeps every local variable of the stack alive
