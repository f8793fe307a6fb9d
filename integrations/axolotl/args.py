"""The keys that the plugin adds to Axolotl's config: the `salora:` block, made from `OPTIONS`, and two beside it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    create_model,
    model_validator,
)

from ...options import OPTIONS, Option, RankPattern
from ...ranks import RULES, Rank, side_of
from .block_checks import (
    as_config,
    check_adapter_folder,
    check_basis_method,
    check_files,
    check_kernels,
    check_rank_for_vllm,
    check_refusals,
    check_sharded,
    options_of_block,
)
from .errors import check_block, in_one_sentence
from .host_options import check_host_options

ADAPTER = "salora"

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """YAML 1.1, as Axolotl reads it, takes 1e-1 for a text; beside `learning_rate: 1e-4` it is meant as a number."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


_Share = Annotated[float, Field(gt=0, lt=1, strict=True), BeforeValidator(_number)]
_PositiveFloat = Annotated[PositiveFloat, BeforeValidator(_number)]


def _kind(option: Option) -> Any:
    """The type of an option's value in a YAML file."""
    number: Any = Annotated[int, Field(ge=option.least)]
    if option.several:
        return str | list[str | dict[str, Any]]
    if option.name == "sae":
        # Axolotl logs its config with sorted keys, and texts and numbers have no order.
        return str | dict[Annotated[str, BeforeValidator(str)], str]
    if option.type is Any:  # of what it can be in Python, a file has the names only
        return str
    if option.type is int:
        return number
    if option.type is float:
        return Annotated[float, Field(ge=option.least)]
    rules = [name for name, rule in RULES.items() if side_of(option.name) in rule.sides]
    rank: Any = number | _Share
    if rules:
        rank = rank | Annotated[str, Field(pattern=f"^({'|'.join(rules)}):")]
    if option.type == Rank:
        return rank
    if option.type == RankPattern:
        return dict[str, rank]
    return option.type


def _key(option: Option) -> tuple[Any, Any]:
    """Type and field of the key for an option, whose value is not converted: a text is no number, and true is not 1."""
    description = option.described(_DEFAULTS_HERE.get(option.name))
    may_be_float = option.type in (float, Rank)

    def check(value: Any) -> Any:
        value = _number(value) if may_be_float else value
        if value is not None:  # the default
            option.check(value, named=f"salora.{option.name}")
        return value

    return Annotated[_kind(option) | None, BeforeValidator(check)], Field(default=None, description=description)


# What Axolotl has in the place of the default.
_DEFAULTS_HERE = {"task_data": "the training rows", "seed": "Axolotl's `seed`, or else 0"}

_keys: dict[str, Any] = {option.name: _key(option) for option in OPTIONS.values()}
_Keys: Any = create_model("_Keys", **_keys)

# A text is no number, true is not 1, and infinity is neither here.
_AS_WRITTEN = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class MonitorOptions(BaseModel):
    """The `salora.monitor` block: options of `SafetyMonitorCallback`, whose defaults they have."""

    model_config = _AS_WRITTEN

    harmful: str | None = Field(
        default=None, description="Harmful requests: `builtin`, a file or a hub data set id. Default: builtin."
    )
    num_requests: PositiveInt | None = Field(default=None, description="How many of them. Default: 32.")
    every_steps: PositiveInt | None = Field(
        default=None, description="Measure at these steps. Default: at every evaluation."
    )
    stop_at_margin_drop: _PositiveFloat | None = Field(
        default=None,
        description="Stop training once the refusal margin has fallen by this share of the base model's. Default: "
        "never.",
    )
    max_time_share: _PositiveFloat | None = Field(
        default=None, description="Share of the training time that measuring may take. Default: 0.05."
    )
    batch_size: PositiveInt | None = Field(default=None, description="Requests per forward pass. Default: 16.")


class RefusalAnchorOptions(BaseModel):
    """The `salora.refusal_anchor` block: options of `RefusalAnchorCallback`, whose defaults they have."""

    model_config = _AS_WRITTEN

    weight: _PositiveFloat | None = Field(
        default=None, description="What the divergence, in nats per token, counts beside the loss. Default: 1.0."
    )
    every: PositiveInt | None = Field(
        default=None,
        description="At every so many optimizer steps. Default: as often as costs at most 5 % of the training's time, "
        "and at most at every 8th.",
    )
    num_requests: PositiveInt | None = Field(
        default=None, description="Refusals that are looked at, at the most. Default: 128."
    )
    batch_size: PositiveInt | None = Field(
        default=None, description="How many of them at once, over all processes together. Default: 8."
    )
    num_tokens: PositiveInt | None = Field(default=None, description="At how many tokens of a refusal. Default: 8.")
    top_tokens: PositiveInt | None = Field(
        default=None, description="How many of the base's most probable tokens are told apart. Default: 256."
    )
    direction: Literal["forward", "reverse"] | None = Field(
        default=None, description="KL(base || adapted), or KL(adapted || base). Default: forward."
    )


class SaLoRAOptions(_Keys):
    """The `salora:` block. Every key is optional; one that is left out has the default of `SaLoRAConfig`."""

    model_config = ConfigDict(extra="forbid")

    monitor: StrictBool | MonitorOptions | None = Field(
        default=None,
        description="Log the refusal margin, the KL divergence from the base model on harmful requests and the "
        "certificate at every evaluation: true, or a block of options. Default: false.",
    )
    refusal_share: _Share | None = Field(
        default=None,
        description="Share of the training rows that are the base model's own refusals of the requests in safety_data, "
        "mixed in before training. Default: none.",
    )
    refusal_anchor: StrictBool | RefusalAnchorOptions | None = Field(
        default=None,
        description="Add the KL divergence from the base model where its refusals of the requests in safety_data begin "
        "to the loss: true, or a block of options. Default: false.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                guess = f"Did you mean salora.{close[0]}? " if close else ""
                raise ValueError(
                    f"salora.{key}: there is no such option. {guess}The options are {', '.join(cls.model_fields)}."
                )
        return data


def _refuse_what_axolotl_passes_over(config: type[BaseModel], data: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: A key of the block stands beside it, or the block's own name is misspelled: Axolotl passes over what
            it does not know.
    """
    for key in data:
        if key in config.model_fields:
            continue
        if key in SaLoRAOptions.model_fields:
            raise ValueError(f"{key}: this is an option of the block. Write it below salora:, as salora.{key}.")
        if difflib.get_close_matches(str(key).lower(), [ADAPTER], cutoff=0.8):
            raise ValueError(f"{key}: there is no such key. Did you mean salora:, the block of options?")


class SaLoRAArgs(BaseModel):
    """What the plugin adds to Axolotl's config; Axolotl makes it a base class of its own config class."""

    salora: SaLoRAOptions | None = Field(default=None, description="Options of `adapter: salora`.")
    lora_exclude_modules: str | list[str] | None = Field(
        default=None,
        description="Modules that get no adapter although lora_target_modules or lora_target_linear matches them: "
        "names, or a regular expression. Axolotl's loader reads this key, which its own config lacks.",
    )
    inference: bool | None = Field(
        default=None, description="Set by `axolotl inference`, for `adapter: salora` to load a saved adapter as it is."
    )

    if TYPE_CHECKING:  # keys of Axolotl's own config, which are there when the validators below run
        adapter: str | None
        merge_lora: bool | None
        load_in_4bit: bool | None
        load_in_8bit: bool | None
        overrides_of_model_kwargs: dict[str, Any] | None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_wrong(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        with in_one_sentence():
            if data.get("adapter") == ADAPTER:
                check_host_options(data)
                _refuse_what_axolotl_passes_over(cls, data)
                if data.get("salora") is not None:
                    check_block(SaLoRAOptions, data["salora"], "salora")
            elif data.get("salora") is not None:
                raise ValueError(
                    f"salora: the block has no effect with adapter: {data.get('adapter')}. Set adapter: salora, or "
                    "remove the block."
                )
        return data

    @model_validator(mode="after")
    def _check_options(self) -> SaLoRAArgs:
        if getattr(self, "adapter", None) != ADAPTER:
            # Axolotl's config has no such keys: its own runs stay as they are.
            self.inference = self.lora_exclude_modules = None
            return self
        block = {} if self.salora is None else self.salora.model_dump(exclude_none=True)
        options = options_of_block(block)
        trains = not (self.inference or self.merge_lora)
        with in_one_sentence():
            if trains:
                check_files(block)
                check_adapter_folder(self)
            check_basis_method(options)
            config = as_config(options)
            if trains:
                check_kernels(self, config)
                check_refusals(self)
                check_sharded(self, config)
            check_rank_for_vllm(self, config)
        return self

    @model_validator(mode="after")
    def _reserve_quantization_config(self) -> SaLoRAArgs:
        """
        Axolotl quantizes for its own adapters only. Whatever stands in `model_kwargs` goes to `from_pretrained`
        for all of them; the values are filled in before the model is loaded, when the dtype is known.
        """
        if getattr(self, "adapter", None) == ADAPTER and (self.load_in_4bit or self.load_in_8bit):
            self.overrides_of_model_kwargs = {"quantization_config": {}, **(self.overrides_of_model_kwargs or {})}
        return self
