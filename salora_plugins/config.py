"""`SaLoRAConfig`: everything of PEFT's `LoraConfig`, and the options of SaLoRA."""

from __future__ import annotations

import copy
import dataclasses
import enum
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType

from .lora_options import COMPATIBLE_LORA_FIELDS, WHAT_TO_USE_INSTEAD, check_lora_entries, check_lora_options
from .options import OF_BASIS_METHODS, OPTIONS, AdapterOptions, Positions, check_number
from .plugins import basis_needs, register_peft_types
from .ranks import Rank, Side, ranks_of
from .rows.sources import sources_of
from .safety_module import DEFAULT_FILE
from .support.files import read_json_object
from .support.texts import placeholder

CONFIG_FILE = "salora_config.json"
"""Beside the weights of a trained adapter: the configuration that it was trained with."""

DIGEST_KEY = "adapter_sha256"
"""In that file: the digest of the weights that were saved with it, see `adapters.digest.adapter_digest`."""

# Of the factors that are saved with init="task" and "pissa": [A - A_0; A_0] and [B, B - B_0]. Before, it was
# [A; A_0] and [B, -B_0], without a number in the file.
FORM_KEY, FORM_OF_FACTORS = "form_of_factors", 2

NOTES_KEY = "training_notes"
"""In that file, where there are any: what the adapter was trained on beside the task, for the model card."""

HEADS_ADDED_LATER: dict[str, list[str]] = {
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Of these tasks PEFT adds the head to `modules_to_save` when the adapter is there already."""

# Never written to a file: objects that live only in this process.
_RUN_TIME_FIELDS = frozenset({"tokenizer", "runtime_config"})
# What may be an object, of which a file has the name.
_NAMED_FIELDS = frozenset({"safety_data", "task_data", "utility_data", "contrastive_data", "safety_module"})


class SaLoRAPeftType(enum.StrEnum):
    """The PEFT type under which SaLoRA is registered; equal to, and hashed as, the string "SALORA"."""

    SALORA = "SALORA"

    def __format__(self, format_spec: str) -> str:
        # PEFT formats it in messages only: where a saved adapter, which is plain LoRA, is loaded beside this one.
        return "SALORA (salora_plugins.load_adapter loads a saved SaLoRA adapter beside one in training)"


@dataclass
class SaLoRAConfig(AdapterOptions, LoraConfig):
    """
    Configuration of a SaLoRA adapter: all of [`~peft.LoraConfig`], with `r` and `lora_alpha` defaulting to the
    paper's 16, and the options below.

    Reference: Li, Si, Backes, Zhang, Wang: "SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation", ICLR 2025,
    https://arxiv.org/abs/2501.01765

    Args:
        safety_rank (`int`, `float` or `str`, defaults to 32):
            Number r_s of output directions per layer that the update may not write into (columns of U_C). Higher
            values protect more and leave less room to learn; must be smaller than the layer's output. A float such as
            0.95: as many as capture that share of the energy of the layer's outputs on the safety data. "entropy:0.85":
            as many as make up that share of the entropy of its spectrum (LSSF, arXiv 2602.00038). With
            `basis_method="sae"` and `variant="sails"` the default, 32 whether given or not, means as many as have 80 %
            of the variance of the features' directions, layer by layer; any other number is that number.
        variant (`"two-sided"`, `"paper"` or `"sails"`, defaults to `"two-sided"`):
            "two-sided": the update may neither write into the directions in which the outputs of refused requests lie,
            nor react to those in which such requests come in. Goes beyond the paper; what it keeps is measured in
            docs/evidence/safety-retention.md.
            "paper": the output side only, calibrated on the positions of the response.
            "sails": SAILS (arXiv 2512.23260), which teaches refusals instead of keeping them: nothing is protected, and
            B starts at 0.1 of the first r directions that `basis_method="sae"` finds, beside a random A. Needs `sae`
            and `contrastive_data`; train on safety rows. See docs/methods/sails.md.
        input_safety_rank (`int`, `float` or `str`, *optional*):
            Number of input directions per layer that the update may not react to (columns of V_C), or the share of
            the energy of the layer's inputs that they capture, or "leak:0.05": the smallest of 16, 32, 64, ... that
            leaks no more than that (see docs/choose.md), at most half of the inputs, or "entropy:0.85" as for
            `safety_rank`. `None`: those of `safety_module`
            where one is given, otherwise a quarter of the layer's inputs, at most 256 and at most the positions of the
            safety data. 0 is no input side.
        safety_rank_pattern, input_safety_rank_pattern (`dict[str, int | float | str]`, defaults to `{}`):
            Ranks of single modules: names or regular expressions, matched like those of `rank_pattern`.
        safety_positions (`"response"`, `"predicting"`, `"prompt"`, `"header"` or `"all"`, *optional*):
            Which positions of the safety data count, for both sides: those whose input is a response token (the paper's
            code), or those that predict one, which include the last prompt token, or those of the prompt, or of these
            the ones behind the request's own text ("header": the end of the turn and the assistant's header, as the
            chat template writes them; the answer begins at the last of them), or every token of prompt and response.
            `None` means "response" without an input side and "prompt" with one.
        task_rank (`int`, defaults to 32):
            Number r_t of task directions kept by `init="task"`.
        init (`"task"`, `"pissa"`, `"zero"` or `"sails"`, *optional*):
            Start of the factors. "task": the weight's top singular directions, their output side restricted to
            what the task data uses (the paper's). "pissa": the same without the restriction (the paper's ablation).
            "zero": B = 0 and a random A as in LoRA, and the saved adapter has rank r instead of 2r. "sails": that of
            the variant, and of no other. None of them changes what the model computes before the first step. `None`
            means "zero" with an input side, and "task" without one or where an option of the task start is given:
            `task_data`, another `task_rank` or `num_task_samples` than by default.
        safety_data (`str`, path, `datasets.Dataset` or list, defaults to `"builtin"`):
            Harmful requests, with the model's safe responses or without (then the model's own greedy answers are
            taken, and kept if they are refusals): "builtin" or another registered source; a file (.jsonl, .json, .csv,
            .parquet, or .txt with a request a line), a folder, a data set of the hub; a list of several of these, or
            of rows or of requests (a text in a list is a source where it is a registered name, an existing file, or
            "organization/name"). "advbench", "harmbench", "strongreject" and "xstest-unsafe" are registered, too, for
            those who have access to these sets on the hub.
        task_data (`str`, path, `datasets.Dataset` or list, *optional*):
            Training examples for `init="task"`. The leak is measured against them, too, whatever the start is. `None`
            takes the first batch that is trained on, and built-in everyday requests for the leak.
        safety_module (`str`, path or [`SafetyModule`], *optional*):
            A safety module computed before, as a file, a folder or a repository of the Hugging Face hub
            ("organization/name", or "organization/name@revision"); skips calibration.
        basis_method (`str`, defaults to `"salora"`):
            Name of the method that turns the statistics of the safety data into bases: "salora"; "actsvd", which
            leaves out what utility data shares (Wei et al. 2024); "weight-delta", from two checkpoints and without
            data; "sae", from sparse autoencoders and pairs of responses (SAILS); plugins can add methods.
        num_safety_samples (`int`, defaults to 512):
            Safety examples to calibrate on, at most, spread evenly over what `category`, `form` and `language` of the
            rows say.
        num_task_samples (`int`, defaults to 128): Task examples for `init="task"` where `task_data` is given.
        calibration_batch_size (`int`, defaults to 16): Examples per forward pass of a calibration.
        calibration_max_length (`int`, defaults to 512): Tokens per calibration example; longer ones are cut.
        calibration_engine (`"auto"`, `"exact"` or `"sketched"`, defaults to `"auto"`):
            How the layers' statistics are kept: Gram matrices (d^2 numbers a layer), or sketches (two to four times the
            rank, times d). "auto" is exact while the matrices take at most 256 MiB together.
        calibration_cache (`bool`, defaults to `True`):
            Keep the calibrated safety module in the folder that the environment variable `SALORA_CACHE` names (default:
            `~/.cache/salora-plugins`), and take it from there when model, data and settings are the same.
        seed (`int`, defaults to 0): Seed of the selection of examples and of randomized decompositions.
        header_weight (`float`, defaults to 1.0):
            How many times as much as another position one of the header counts, where `safety_positions` is "prompt" or
            "all": with 10 its vectors count ten times in the sums of outer products. 0 leaves the header out.
        utility_data (`str`, path, `datasets.Dataset` or list, defaults to `"builtin"`):
            Everyday requests, for a `basis_method` that tells safety from utility: in the forms of `safety_data`, with
            responses or without (then the model's own greedy answers are taken, and what it refuses is left out).
            "builtin": 128 everyday requests that come with this package.
        num_utility_samples (`int`, defaults to 128): Utility examples to calibrate on, at most.
        utility_rank, input_utility_rank (`int`, *optional*):
            Number k_u of directions per layer that hold its utility, with `basis_method="actsvd"`. `None`: four times
            `safety_rank` (`input_safety_rank`), cut to what the utility data has and to half of the layer, so that it
            leaves some. A number that leaves nothing of a layer's safety directions is an error.
        contrastive_data (`str`, path, `datasets.Dataset` or list, *optional*):
            Rows with `prompt`, a safe response `chosen` and an unsafe one `rejected`, for `basis_method="sae"`; at most
            `num_safety_samples` of them are read.
        contrastive_positions (`"response"`, `"predicting"`, `"prompt"`, `"header"`, `"all"`, defaults to `"response"`):
            Which positions of the contrastive data count, as `safety_positions` says it.
        sae (`str`, path or `dict`, *optional*):
            The sparse autoencoder of each layer, for `basis_method="sae"`: "RELEASE:ID" of sae-lens or a folder, with
            `{layer}` in the place of the layer's number, or a mapping from the number to such.
        sae_feature_share (`float`, defaults to 0.3):
            Share of the autoencoder's features, those that differ most between safe and unsafe responses, whose
            directions are used.
        unaligned_model (`str` or path, *optional*):
            The model before its alignment (a base model, or one that lost its refusals), for
            `basis_method="weight-delta"`: a folder or a repository of the hub ("organization/name@revision"), with
            layers of the same names and shapes. It is read a weight at a time.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model, used to render data that is not tokenized yet; never saved. `None` takes that of the
            trainer that is being made, or the one in the model's own folder or repository.
    """

    r: int = field(default=16, metadata={"help": "Rank of the trained factors A and B."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha; the scaling is lora_alpha / r."})
    tokenizer: Any = field(default=None, repr=False, metadata={"help": "Tokenizer; run time only, never saved."})

    def __post_init__(self) -> None:
        register_peft_types()
        # First of all, since what follows compares the values.
        for option in OPTIONS.values():
            option.check(getattr(self, option.name))
        check_number("r", self.r, 1)
        check_lora_options(self)
        super().__post_init__()
        self.peft_type = SaLoRAPeftType.SALORA
        self._take_names_of_paths()
        self._resolve_start()
        self._refuse_contradicting_options()
        self._refuse_options_of_other_methods()
        self._refuse_contradicting_lora_options()
        # Not fields, so that they are neither compared nor saved.
        self.weights_follow = False  # start factors are not needed, since saved ones are loaded next
        self._warned_about: set[str] = set()
        self.warn_about_weights_outside_the_safety_module()

    def _take_names_of_paths(self) -> None:
        """Of what a file must hold as a text: paths, and the layers' numbers in a mapping `sae`."""
        self.unaligned_model = _text_of_path(self.unaligned_model)
        if isinstance(self.sae, Mapping):
            self.sae = {str(layer): _text_of_path(source) for layer, source in self.sae.items()}
        else:
            self.sae = _text_of_path(self.sae)

    def _resolve_start(self) -> None:
        """Choose `init` where it is None, and warn of options that only `init="task"` heeds with another one."""
        if self.variant == "sails":
            self._resolve_sails()
        elif self.init == "sails":
            raise ValueError("init='sails' is the start of variant='sails': set that, or another init.")
        given = [] if self.task_data is None else ["task_data"]
        given += [name for name in ("task_rank", "num_task_samples") if getattr(self, name) != OPTIONS[name].default]
        if self.init is None:
            self.init = "zero" if self.has_input_side and not given else "task"
            return
        if self.init == "task":
            return
        if "task_data" in given and self._measures_leak:
            given.remove("task_data")  # which the leak is measured against
        if given:
            warnings.warn(
                f"{', '.join(given)} has no effect with init={self.init!r}: leave it out, or set init='task'.",
                UserWarning,
                stacklevel=4,
            )

    @property
    def _measures_leak(self) -> bool:
        """Whether a calibration for this configuration measures the leak."""
        if not self.has_input_side or self.safety_module is not None:
            return False
        if self.basis_method == "salora":
            return True  # the usual case; the others ask all plugins
        needs = basis_needs().get(self.basis_method)
        return needs is not None and needs.reads_safety_rows(True)

    def _resolve_sails(self) -> None:
        """Take the start and the method of the variant; refuse others, and what is about protection."""
        if self.init not in (None, "sails"):
            raise ValueError(f"init={self.init!r}: variant='sails' has a start of its own. Leave init out.")
        if self.basis_method not in (OPTIONS["basis_method"].default, "sae"):
            raise ValueError(f"basis_method={self.basis_method!r}: variant='sails' takes the directions of 'sae'.")
        for name in ("safety_data", "safety_positions", "input_safety_rank", "input_safety_rank_pattern"):
            value, default = getattr(self, name), OPTIONS[name].default
            if type(value) is not type(default) or value != default:
                raise ValueError(
                    f"{name}={_name_of(value)!r} has no effect with variant='sails', which protects nothing: leave it "
                    "out. The directions follow from contrastive_data and sae; safety rows are what you train on."
                )
        self.init, self.basis_method = "sails", "sae"

    def _refuse_contradicting_options(self) -> None:
        if self.variant == "paper" and self.input_safety_rank:
            raise ValueError(
                f"input_safety_rank={self.input_safety_rank!r}: variant='paper' has no input side. Leave it out, or "
                "choose variant='two-sided'."
            )
        if self.input_safety_rank_pattern and not self.has_input_side:
            raise ValueError(
                "input_safety_rank_pattern has no effect without an input side: leave variant and input_safety_rank at "
                "their defaults, or set input_safety_rank for the modules that it does not name, too."
            )
        positions = self.resolved_safety_positions
        if self.header_weight != 1 and positions not in ("prompt", "all"):
            raise ValueError(
                f"header_weight={self.header_weight!r} has no effect with safety_positions={positions!r}, where no "
                "position of the header counts beside others: leave it out, or choose safety_positions 'prompt' or "
                "'all'."
            )
        if isinstance(self.task_data, str) and self.task_data == "builtin":
            raise ValueError(
                "task_data='builtin': there is no built-in task data. Name the data that you train on, or leave "
                "task_data=None to take it from the first training batch."
            )
        if self.init != "zero" and self.lora_alpha <= 0:
            raise ValueError(
                f"lora_alpha={self.lora_alpha!r}: init={self.init!r} divides by the scaling; give a positive value, or "
                "use init='zero'."
            )
        if self.input_utility_rank is not None and not self.has_input_side:
            raise ValueError("input_utility_rank has no effect without an input side: leave it out.")

    def _refuse_options_of_other_methods(self) -> None:
        """
        Options that this basis method does not read. With a safety module nothing is calibrated; a method of a plugin
        that is not here is left to the calibration.
        """
        if self.safety_module is not None:
            return

        def given(names: Collection[str]) -> list[str]:
            return [name for name in OPTIONS if name in names and not _is_default(name, getattr(self, name))]

        if self.basis_method == "salora" and not given(OF_BASIS_METHODS):
            return  # the usual case; the others ask all plugins
        all_needs = basis_needs()
        needs = all_needs.get(self.basis_method)
        if needs is None:
            return
        if unread := given(set(OF_BASIS_METHODS) - needs.read_options):
            readers = sorted(name for name, of_method in all_needs.items() if unread[0] in of_method.read_options)
            raise ValueError(
                f"{unread[0]}={getattr(self, unread[0])!r:.80} has no effect with basis_method={self.basis_method!r}: "
                f"leave it out{', or set basis_method to one that reads it: ' + ', '.join(readers) if readers else ''}."
            )
        if unread := given(needs.unread_options(self.has_input_side)):
            raise ValueError(
                f"{unread[0]}={getattr(self, unread[0])!r:.80} has no effect with basis_method={self.basis_method!r}, "
                "which reads no safety data: leave it out."
            )
        if needs.unaligned_model and self.unaligned_model is None:
            raise ValueError(
                f"basis_method={self.basis_method!r} compares the model with the one before its alignment: name that "
                "with unaligned_model, a folder or a hub repository."
            )

    def _refuse_contradicting_lora_options(self) -> None:
        own = {f.name for f in dataclasses.fields(SaLoRAConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
        for option in dataclasses.fields(self):
            if option.name in COMPATIBLE_LORA_FIELDS or option.name in own:
                continue
            value = getattr(self, option.name)
            default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
            if value == default or (not value and not default):  # such as an empty list for None
                continue
            advice = WHAT_TO_USE_INSTEAD.get(option.name, f"Leave {option.name} at its default ({default!r}).")
            shown = f"{type(value).__name__}(...)" if dataclasses.is_dataclass(value) else repr(value)
            raise ValueError(f"{option.name}={shown} cannot be combined with SaLoRA. {advice}")

    def warn_about_weights_outside_the_safety_module(self) -> None:
        """
        Warn of options that train other weights than the adapter's, once for every option.

        The tuner calls it again: PEFT adds the head of a sequence classifier to `modules_to_save`, and TRL its new
        tokens, after the configuration was made.
        """
        outside = {
            "modules_to_save": self.modules_to_save or HEADS_ADDED_LATER.get(self.task_type or ""),
            "bias": None if self.bias == "none" else self.bias,
            "trainable_token_indices": self.trainable_token_indices,
        }
        for name, value in outside.items():
            if value and name not in self._warned_about:
                self._warned_about.add(name)
                warnings.warn(
                    f"{name}={value!r} trains weights that the safety module does not protect: refusals can be lost "
                    "through them, and the certificate does not cover them.",
                    UserWarning,
                    stacklevel=4,
                )

    @property
    def has_input_side(self) -> bool:
        """Whether a safety module that is computed for this configuration has an input side."""
        return self.variant == "two-sided" and self.input_safety_rank != 0

    @property
    def resolved_safety_positions(self) -> Positions:
        """`safety_positions`, with `None` resolved by whether there is an input side."""
        if self.safety_positions is not None:
            return self.safety_positions
        return "prompt" if self.has_input_side else "response"

    def safety_ranks(
        self, default_input_ranks: Mapping[str, int], default_ranks: Mapping[str, Rank] | None = None
    ) -> dict[Side, dict[str, Rank]]:
        """
        Args:
            default_input_ranks: Module name -> rank of its input side where no option names one.
            default_ranks: The same of the output side; None: `safety_rank`.

        Returns:
            Side ("output" and, if there is one, "input") -> module name -> rank.
        """
        names = default_input_ranks.keys()
        output = self.safety_rank if default_ranks is None else default_ranks
        ranks: dict[Side, dict[str, Rank]] = {"output": ranks_of(names, output, self.safety_rank_pattern)}
        if self.has_input_side:
            pattern = self.input_safety_rank_pattern
            default = default_input_ranks if self.input_safety_rank is None else self.input_safety_rank
            ranks["input"] = ranks_of(names, default, pattern, option="input_safety_rank_pattern")
        return ranks

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; data and modules given as objects are named by their type."""
        result = {}
        for option in dataclasses.fields(self):
            if option.name in _RUN_TIME_FIELDS:
                continue
            value = getattr(self, option.name)
            if option.name in _NAMED_FIELDS:
                value = _name_of(value)
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            result[option.name] = copy.deepcopy(value)
        return result

    def to_lora_config(self) -> LoraConfig:
        """
        The plain [`~peft.LoraConfig`] under which the trained adapter is saved.

        With `init="task"` or `"pissa"` the saved factors are the concatenations [A - A_0; A_0] and [B, B - B_0] of
        rank 2r (projected), so that ranks double and alphas grow by 2 (by sqrt(2) with rsLoRA): every layer keeps its
        scaling.
        """
        shared = {f.name for f in dataclasses.fields(LoraConfig)} - {"peft_type", "init_lora_weights"}
        options = {name: copy.deepcopy(getattr(self, name)) for name in shared}
        if self.init != "zero":
            growth = 2**0.5 if self.use_rslora else 2
            options["r"] = 2 * self.r
            options["lora_alpha"] = growth * self.lora_alpha
            options["rank_pattern"] = {key: 2 * rank for key, rank in (self.rank_pattern or {}).items()}
            options["alpha_pattern"] = {key: growth * alpha for key, alpha in (self.alpha_pattern or {}).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own remarks were made when this config was created
            return LoraConfig(**options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """
        Read the configuration of a saved SaLoRA adapter, or one that was saved on its own.

        For a trained adapter the safety module beside it is named in `safety_module`.
        """
        register_peft_types()  # PEFT looks the class up, and this may be the first use of SaLoRA in the process
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        values = read_side_config(folder)
        if values is None:
            return super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        check_form(values, folder / CONFIG_FILE)
        for key in (DIGEST_KEY, FORM_KEY, NOTES_KEY):
            values.pop(key, None)
        check_lora_entries(values, folder / CONFIG_FILE)
        # What it was computed from is in the safety module's provenance; the data itself may be gone.
        data = {"safety_data": "builtin", "task_data": None, "utility_data": "builtin", "contrastive_data": None}
        values.update(data, safety_module=str(folder / DEFAULT_FILE))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return cls.from_peft_type(**{**values, "peft_type": SaLoRAPeftType.SALORA})
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / CONFIG_FILE} cannot be used: {error}") from error


def without_unread_safety_data(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options of a host without `safety_data` where the basis method does not read it: for a host that has another use for
    it, since training on refusals, or measuring them, asks its requests.
    """
    variant = options.get("variant") or OPTIONS["variant"].default
    method = "sae" if variant == "sails" else options.get("basis_method") or OPTIONS["basis_method"].default
    needs, has_input_side = basis_needs().get(method), variant == "two-sided" and options.get("input_safety_rank") != 0
    is_unread = needs is not None and "safety_data" in needs.unread_options(has_input_side)
    return {name: value for name, value in options.items() if not (is_unread and name == "safety_data")}


def check_form(values: dict[str, Any], file: Path) -> None:
    """
    Args:
        values: Content of the `salora_config.json` of a saved adapter.
        file: Where it was read, for messages.

    Raises:
        ValueError: Its factors are saved in another form than this version's, and would be read as something else.
    """
    if values.get("init") != "zero" and values.get(FORM_KEY) != FORM_OF_FACTORS:
        raise ValueError(
            f"{file}: the factors of this adapter (init={values.get('init')!r}) were saved in another form "
            f"({FORM_KEY}={values.get(FORM_KEY)!r}) than this version trains on ({FORM_OF_FACTORS}). Train "
            "it further with the version that saved it. For everything else it is a plain LoRA adapter: "
            "PeftModel.from_pretrained."
        )


def _is_default(name: str, value: Any) -> bool:
    default = OPTIONS[name].default
    return value is default or (isinstance(value, (str, int, float)) and value == default)


def _text_of_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _name_of(value: Any) -> str | None:
    """A short, saveable description of a data source or a safety module."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if (several := sources_of(value, "safety_data")) is not None:
        return ", ".join(map(str, several))
    return placeholder(value)


def read_side_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    Content of the `salora_config.json` beside an adapter; None where there is none.

    Raises:
        ValueError: It cannot be read.
    """
    file = Path(folder) / CONFIG_FILE
    return read_json_object(file) if file.is_file() else None
