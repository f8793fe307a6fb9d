"""SaLoRA among PEFT's methods: importing this module registers its type, configuration and tuner."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel

from .config import SaLoRAConfig, SaLoRAPeftType
from .tuner import SaLoRAModel

# PEFT annotates these by its own enum, whose members are strings as well.
PEFT_TYPE_TO_CONFIG_MAPPING[SaLoRAPeftType.SALORA] = SaLoRAConfig  # type: ignore[index]  # see above
PEFT_TYPE_TO_TUNER_MAPPING[SaLoRAPeftType.SALORA] = SaLoRAModel  # type: ignore[index]  # see above
PEFT_TYPE_TO_PREFIX_MAPPING[SaLoRAPeftType.SALORA] = LoraModel.prefix  # type: ignore[index]  # see above
