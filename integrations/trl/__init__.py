"""SaLoRA in TRL: command-line arguments for `TrlParser`, and a callback for the task initialization.

`peft_config=SaLoRAConfig(...)` is all that TRL's trainers need; nothing here is required.
"""

from ...support.hosts import CORE, explained, warn_of_unsupported

warn_of_unsupported(*CORE, "trl")
with explained(*CORE, "trl"):
    from .arguments import (
        SaLoRAArguments,
        get_peft_config,
        read_dataset,
        say_how_to_evaluate,
        train_on_refusals,
    )
    from .callback import TaskInitializationCallback

__all__ = [
    "SaLoRAArguments",
    "TaskInitializationCallback",
    "get_peft_config",
    "read_dataset",
    "say_how_to_evaluate",
    "train_on_refusals",
]
