"""Writes docs/reference/ from the code: the options of every host, the commands, the public functions and the hooks.

It also puts the sections of README.md that other pages repeat into these, so that each is written once.

    python tools/write_reference.py          # or `make reference`; needs TRL and Axolotl, whose options are among them

What functions and hooks say of themselves is put in by mkdocstrings when the pages are built; these pages name them.
tests/test_docs.py compares the committed pages with what this script gives.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by tools/write_reference.py from the code: change it there, then run `make reference`. -->"

_SECTION = re.compile(r"<!-- section: (\w+) -->\n(.*?)<!-- end of section -->", re.DOTALL)
_REPEATED = re.compile(r"(<!-- section of README.md: (\w+) -->\n).*?(<!-- end of section -->)", re.DOTALL)


def with_sections_of_the_readme(text: str) -> str:
    """A page with the sections that it repeats as README.md has them now."""
    sections = dict(_SECTION.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    return _REPEATED.sub(lambda place: place[1] + sections[place[2]] + place[3], text)


def configuration_page() -> str:
    """The options that `SaLoRAConfig` adds to PEFT's `LoraConfig`, or gives another default."""
    from peft import LoraConfig

    from salora_plugins import SaLoRAConfig

    inherited = {option.name: _default(option) for option in dataclasses.fields(LoraConfig)}
    own = [
        option
        for option in dataclasses.fields(SaLoRAConfig)
        if option.init and (option.name not in inherited or _default(option) != inherited[option.name])
    ]
    return _page(
        "SaLoRAConfig",
        "Everything of PEFT's `LoraConfig`, and these options. What each does in full stands in the "
        "[docstring](python.md); which to choose when, in [Choose a method](../choose.md). Options of LoRA that SaLoRA "
        "does not leave their meaning are [refused](../refused.md).",
        _option_table(_of_dataclass(own, typing.get_type_hints(SaLoRAConfig))),
    )


def axolotl_page() -> str:
    """The `salora:` block, and what else the plugin adds to Axolotl's configuration."""
    project = _project()
    plugin = _load(project["entry-points"]["axolotl.plugins"]["salora"])
    arguments = _load(plugin().get_input_args())
    command = _load(project["entry-points"]["axolotl.cli_commands"]["salora-calibrate"])
    block = _model_in(arguments.model_fields["salora"].annotation)
    monitor = _model_in(block.model_fields["monitor"].annotation)
    anchor = _model_in(block.model_fields["refusal_anchor"].annotation)
    return _page(
        "Axolotl",
        "`adapter: salora` takes Axolotl's own `lora_*` options, and the block `salora:`, in which every key is "
        "optional. One that is left out has the default of [SaLoRAConfig](configuration.md). Whole configurations are "
        "in `examples/`.",
        "## `salora:`",
        _option_table(_of_pydantic(block)),
        "## `salora.monitor:`",
        "`monitor: true` takes the defaults of `SafetyMonitorCallback`.",
        _option_table(_of_pydantic(monitor)),
        "## `salora.refusal_anchor:`",
        "`refusal_anchor: true` takes the defaults of `RefusalAnchorCallback`.",
        _option_table(_of_pydantic(anchor)),
        "## Beside the block",
        _option_table(row for row in _of_pydantic(arguments) if row.name != "salora"),
        "## Command",
        *_command("axolotl salora-calibrate", command.help or "", _of_click(command), 3),
    )


def trl_page() -> str:
    """The arguments for TRL's `TrlParser`, and what goes with them."""
    from salora_plugins.integrations import trl

    arguments = trl.SaLoRAArguments
    return _page(
        "TRL",
        "TRL's trainers need nothing but `peft_config=SaLoRAConfig(...)`. For scripts with TRL's own command line "
        "there are these arguments, beside those of `ModelConfig`, whose `--lora_*` apply; `examples/trl_sft.py` and "
        "`examples/trl_dpo.py` use them. One that is not given has the default of [SaLoRAConfig](configuration.md).",
        _option_table(
            dataclasses.replace(row, name=f"--{row.name}", default="" if row.default == "`None`" else row.default)
            for row in _of_dataclass(dataclasses.fields(arguments), typing.get_type_hints(arguments))
        ),
        "## Functions",
        # A plain clone has the folder `integrations/`; it is a part of the package once that is installed.
        *(_documented(f"integrations.trl.{name}", f"salora_plugins.integrations.trl.{name}") for name in trl.__all__),
    )


def commands_page() -> str:
    """The commands of `salora`, without those that installed plugins add."""
    from salora_plugins.cli import create_cli

    group = create_cli()
    parts = []
    for name in sorted(group.commands):
        function = inspect.unwrap(group.commands[name].callback)
        if function.__module__.startswith("salora_plugins."):
            parts += _command(f"salora {name}", function.__doc__ or "", _of_typer(function), 2)
    return _page(
        "Commands",
        "`salora --help` lists them, `salora COMMAND --help` shows the options. An expected error (bad input, a "
        "missing file) is one line and the exit code 1, a wrong use of a command 2. Other packages can [add "
        "commands](../plugins.md). `axolotl salora-calibrate` is in [Axolotl](axolotl.md#command).",
        *parts,
    )


def python_page() -> str:
    """Everything that `import salora_plugins` gives."""
    import salora_plugins

    names = [name for name in salora_plugins.__all__ if not name.startswith("__")]
    return _page(
        "Python",
        "What `import salora_plugins` gives. Modules inside of the package can move; these names stay.",
        *(_documented(f"salora_plugins.{name}", name) for name in sorted(names, key=str.lower)),
    )


def hooks_page() -> str:
    """The hooks of pluggy and the forms of what is registered through them."""
    from salora_plugins import hookspecs

    specs = [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]
    forms = [name for name, value in vars(hookspecs).items() if _is_form(value, hookspecs.__name__)]
    return _page(
        "Hooks",
        "What another package can add, under the entry-point group `salora_plugins`. [Plugins](../plugins.md) has "
        "examples.",
        "## Hooks",
        *(_documented(f"{hookspecs.__name__}.{name}", name) for name in specs),
        "## What is registered",
        *(_documented(f"{hookspecs.__name__}.{name}", name) for name in forms),
    )


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page,
    "axolotl.md": axolotl_page,
    "trl.md": trl_page,
    "commands.md": commands_page,
    "python.md": python_page,
    "hooks.md": hooks_page,
}


@dataclasses.dataclass(frozen=True)
class _Row:
    """One option."""

    name: str
    values: str
    default: str
    meaning: str


def _of_dataclass(options: Iterable[dataclasses.Field], types_of: dict[str, Any]) -> list[_Row]:
    return [
        _Row(option.name, _type(types_of[option.name]), f"`{_default(option)!r}`", option.metadata.get("help", ""))
        for option in options
    ]


def _of_pydantic(model: Any) -> list[_Row]:
    return [
        _Row(name, _type(option.annotation), _shown(option.get_default()), option.description or "")
        for name, option in model.model_fields.items()
    ]


def _of_typer(function: Callable) -> list[_Row]:
    """The parameters as the signature has them: what typer makes of them differs between its versions."""
    rows = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, info = typing.get_args(parameter.annotation)
        is_argument = type(info).__name__ == "ArgumentInfo"
        several = any(typing.get_origin(part) is list for part in (kind, *typing.get_args(kind)))
        if is_argument:
            shown = info.metavar or name.upper()
        else:
            # typer takes the first name for a default where the annotation has no other.
            named = [text for text in (info.default, *(info.param_decls or ())) if str(text).startswith("-")]
            option = name.replace("_", "-")
            shown = ", ".join(named) or (f"--{option} / --no-{option}" if kind is bool else f"--{option}")
        values = "flag" if kind is bool else _in_words(_type(kind).removeprefix("list of "))
        if info.metavar and not is_argument:  # "RANK", or "[auto|exact]"
            values = " or ".join(f"`{choice}`" for choice in _choices(info.metavar))
        required = parameter.default is inspect.Parameter.empty
        default = (
            "required"
            if required
            else ""
            if parameter.default is None or parameter.default is False
            else f"`{parameter.default}`"
        )
        rows.append(_Row(shown, values + (", repeatable" if several else ""), default, info.help or ""))
    return rows


def _of_click(command: Any) -> list[_Row]:
    rows = []
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        name = ", ".join(parameter.opts) if is_option else parameter.name.upper()
        default = "required" if parameter.required else ""
        rows.append(_Row(name, parameter.type.name, default, getattr(parameter, "help", None) or ""))
    return rows


def _command(title: str, text: str, rows: list[_Row], level: int) -> list[str]:
    arguments = [row.name + ("..." if "repeatable" in row.values else "") for row in rows if row.name[0] != "-"]
    required = [f"{row.name} {row.values.upper()}" for row in rows if row.name[0] == "-" and row.default == "required"]
    usage = " ".join([title, *arguments, *required, "[OPTIONS]"])
    return [f"{'#' * level} {title}", inspect.cleandoc(text), f"    {usage}", _option_table(rows)]


def _choices(metavar: str) -> list[str]:
    return metavar.strip("[]").split("|") if "|" in metavar else [metavar]


def _in_words(kind: str) -> str:
    return {"str": "text", "int": "integer", "Path": "path"}.get(kind, kind)


def _option_table(rows: Iterable[_Row]) -> str:
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.values} | {row.default} | {_cell(row.meaning)} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = re.sub(r"%\(\w+\)\S*s", "", text).replace("%%", "%")  # argparse's place for the default
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _documented(identifier: str, heading: str) -> str:
    """Where mkdocstrings puts in what an object says of itself."""
    return f"::: {identifier}\n    options:\n      heading: {heading}\n      toc_label: {heading.rpartition('.')[2]}"


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([NOTE, f"# {title}", *parts]) + "\n"


def _type(annotation: Any) -> str:
    """What values an annotation allows, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value!r}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not types.NoneType))
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if origin in (list, set, tuple):
        return f"list of {_type(arguments[0])}"
    if annotation is Any:
        return "any"
    if hasattr(annotation, "model_fields"):
        return "block"
    return getattr(annotation, "__name__", str(annotation))


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _shown(default: Any) -> str:
    """A default, where None means that it is another's."""
    return "" if default is None else f"`{default!r}`"


def _model_in(annotation: Any) -> Any:
    """The pydantic model among the alternatives of an annotation."""
    return next(part for part in (annotation, *typing.get_args(annotation)) if hasattr(part, "model_fields"))


def _is_form(value: Any, module: str) -> bool:
    """Whether something is a protocol or a record that is defined in the module, or an alias of a callable there."""
    if inspect.isclass(value):
        is_described = getattr(value, "_is_protocol", False) or dataclasses.is_dataclass(value)
        return value.__module__ == module and is_described
    return typing.get_origin(value) is not None and typing.get_origin(value) is Callable


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _load(path: str) -> Any:
    """What `module:name` or `module.name` names."""
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, write in PAGES.items():
        (REFERENCE / name).write_text(write(), encoding="utf-8")
        print(f"Wrote {REFERENCE.relative_to(ROOT) / name}")
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(with_sections_of_the_readme(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
