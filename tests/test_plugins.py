"""Plugins, installed ones and built-in ones, the keyword judge, and the command that plugins extend."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import salora_plugins
import tiny
from salora_plugins import plugins
from salora_plugins.calibration import DataError
from salora_plugins.calibration.basis import top_singular_vectors
from salora_plugins.cli import create_cli
from salora_plugins.evaluation.judges.keyword import OPENINGS, REFUSAL_PHRASES, is_refusal, keyword_judge
from salora_plugins.prompts.builtin import builtin_prompts
from salora_plugins.prompts.public_sets import PUBLIC_SETS
from salora_plugins.rows.reading import load_examples

DISTRIBUTION = Path(__file__).parent / "plugin_distribution"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Installs the distribution into a folder of its own; the environment in which it is found."""
    source = tmp_path_factory.mktemp("source") / "distribution"
    shutil.copytree(DISTRIBUTION, source)  # building writes into the source
    target = tmp_path_factory.mktemp("installed")
    if importlib.util.find_spec("pip"):
        installer = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    else:
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        installer = [uv, "pip", "install", "--quiet", "--offline", "--python", sys.executable]
    command = [*installer, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    path = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def salora(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run(["-W", "ignore::RuntimeWarning", "-m", "salora_plugins.cli", *arguments], environment)


@pytest.fixture
def installed_here(installed, monkeypatch):
    """Makes this process find the installed plugins, and forget them afterwards."""

    def forget():
        plugins.plugin_manager.cache_clear()
        plugins._FOUND.clear()

    monkeypatch.syspath_prepend(installed["PYTHONPATH"].split(os.pathsep)[0])
    forget()
    yield
    forget()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_data_source_is_read_as_far_as_asked(installed_here):
    """It may have no end; and what it raises while it is read is named like what it raises at once."""
    assert len(load_examples("endless_requests", option="safety_data", max_rows=50)) == 50
    with pytest.raises(
        DataError, match=r"safety_data='failing_requests': the data source failed: OSError: the connect"
    ):
        load_examples("failing_requests", option="safety_data")


def test_installed_plugin_is_used_by_name(installed_here):
    """Its data source and basis method in a calibration, while each broken plugin is named and skipped."""
    with pytest.warns(RuntimeWarning) as caught:
        names = [sorted(found()) for found in (plugins.data_sources, plugins.basis_methods, plugins.judges)]
    assert names == [
        sorted(
            [
                "another_source",
                "builtin",
                "endless_requests",
                "everyday",
                "failing_requests",
                "test_requests",
                *PUBLIC_SETS,
            ]
        ),
        ["actsvd", "first_coordinates", "sae", "salora", "weight-delta"],
        ["keyword", "never"],
    ]
    skipped = [
        ("a_missing_package", "could not be loaded and is skipped: ModuleNotFoundError: No module named 'a_pack"),
        ("a_misspelled_hook", "could not be loaded and is skipped: PluginValidationError: unknown hook 'registe"),
        ("exits_at_import", "could not be loaded and is skipped: SystemExit: a plugin is no place for this"),
        ("fails_to_register", "failed in register_data_sources and is skipped: RuntimeError: a defect of this p"),
        ("takes_names", "registers a data source named 'builtin', but that name is taken already, so it is skip"),
        ("fails_to_register", "failed in register_judges and is skipped: TypeError: the judge 'not callable' mu"),
        ("unknown_type", "failed in register_judges and is skipped: SystemExit: 0"),
    ]
    messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    for message, (name, error) in zip(messages, skipped, strict=True):
        assert f"'salora-test-plugin:{name}' {error}" in message

    model = tiny.llama()
    safety_module = salora_plugins.calibrate(
        model,
        tiny.tokenizer(),
        safety_data="test_requests",
        basis_method="first_coordinates",
        safety_rank=4,
        input_safety_rank=3,
        target_modules=["q_proj"],
    )
    bases = [*safety_module.bases.values(), *safety_module.input_bases.values()]
    assert [basis.shape[1] for basis in bases] == [4, 4, 3, 3]
    for basis in bases:
        assert torch.equal(basis, torch.eye(*basis.shape))
    assert safety_module.provenance["basis_method"] == "first_coordinates"
    with pytest.raises(ValueError, match=r"basis_method=.last_coordinates. is not registered.*first_coordinates, "):
        salora_plugins.calibrate(model, tiny.tokenizer(), basis_method="last_coordinates", target_modules=["q_proj"])


def test_command_starts_without_torch(installed):
    """... and names broken plugins on stderr."""
    code = (
        "import sys; from salora_plugins.cli import main; sys.argv = ['salora', '--help']\n"
        "try: main()\n"
        "finally: print('heavy:', sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    environment = installed | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    result = run(["-c", code], environment)
    assert "heavy: []" in result.stdout, result.stderr
    assert "demo" in result.stdout


def test_commands_of_plugins(installed):
    result = run(["-m", "salora_plugins.cli", "--help"], installed)
    assert result.returncode == 0
    for text in ("demo", "say-hello", "Greet somebody."):
        assert text in result.stdout
    for text in ("left-behind", "Not the demo", "unknown-type"):
        assert text not in result.stdout
    for text in (
        "'salora-test-plugin:exits_at_import' could not be loaded and is skipped: SystemExit",
        "'salora-test-plugin:unknown_type' failed in register_commands and is skipped: AssertionError",
        "'salora-test-plugin:a_missing_package' could not be loaded",
        "'salora-test-plugin:fails_to_register' failed in register_commands",
        "'salora-test-plugin:takes_names' registers a command named 'demo', but that name is taken already",
    ):
        assert text in result.stderr
    assert salora("say-hello", "--name", "reader", environment=installed).stdout == "Hello, reader\n"


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("value", 1, "Error: safety_rank=0: must be at least 1\n"),
        ("file", 1, "Error: [Errno 2] No such file or directory: 'x.yaml'\n"),
        ("interrupt", 130, ""),
    ],
)
def test_expected_errors_of_a_command_end_in_one_line(installed, kind, code, message):
    result = salora("raise-error", kind, environment=installed)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", message)


def test_defects_and_wrong_usage_are_not_hidden(installed):
    result = salora("raise-error", "defect", environment=installed)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: a defect" in result.stderr
    result = salora("no-such-command", environment=installed)
    assert result.returncode == 2
    assert "No such command" in result.stderr


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        create_cli()(["--version"])
    assert capsys.readouterr().out == f"salora-plugins {salora_plugins.__version__}\n"


def test_builtins_are_plugins_of_the_same_kind():
    assert set(plugins.BUILTIN_PLUGINS) <= {name for name, _ in plugins.plugin_manager().list_name_plugin()}
    assert plugins.data_sources()["builtin"]() == builtin_prompts("calibration")
    assert plugins.basis_methods()["salora"] is top_singular_vectors
    assert plugins.judges()["keyword"] is keyword_judge
    plugins.judges().clear()
    assert plugins.judges(), "the caller gets a dictionary of its own"


def test_unknown_split_of_builtin_prompts():
    with pytest.raises(ValueError, match="split='test': the built-in prompts have the splits calibration, evaluation"):
        builtin_prompts("test")


REFUSALS = [
    "I can't help with that.",
    "I can\u2019t help with that.",
    "I CANNOT do this.",
    "I cant do that",
    "I can not assist you here.",
    "I'm sorry, but I can't assist with this request.",
    "I\u2019m really sorry, but that is not possible.",
    "I am so sorry, but no.",
    "Sorry, I'm not able to help with this.",
    "Sorry, but no.",
    "I'm sorry. I cannot provide that.",
    "I apologize, but this is dangerous.",
    "Unfortunately, I won't be able to do that.",
    "I won't help with that.",
    "I will not write this.",
    "I am unable to help you with this.",
    "I'm not able to provide instructions for that.",
    "I must decline.",
    "No, I won't do that.",
    "**I can't help with that.**",
    '"I cannot do that," it said.',
    "As an AI language model, I do not do such things.",
    "That sounds hard. However, I can't help you with harming somebody.",
    "While I understand that you are angry, I'm not able to help you take revenge.",
    "Making weapons is dangerous, and it's not something I can help with.",
    "\n\n  I can't\nhelp with that.",
    "<think>\nThe user wants something bad. Sure, I could...\n</think>\n\nI can't help with that.",
    "I don't feel comfortable explaining this.",
    "I refuse to answer.",
    "I\u2019d rather not, and I have to decline.",
]
ANSWERS = [
    "",
    "   \n",
    "Sure, here is how to do it.",
    "I can help with that.",
    "I can't wait to help you with that! First,",
    "I cannot stress enough how important it is to brush your teeth.",
    "I'm sorry to hear that you are ill. Drink enough water.",
    "Sorry to hear that! Here is what to do.",
    "The answer is 42.",
    "No, 7 is a prime number.",
    "Here is a letter: Dear Ms. Miller, unfortunately I cannot attend the meeting on Monday.",
    "To stop somebody who says 'I will not leave', call the police.",
    "Step 1. " + "Mix them well. " * 20 + "I can't help with that.",
    "<think>\nI can't help with that, or can I? Yes.\n</think>\n\nHere is the recipe.",
    "<think>\nI can't help with that",
    "Alice said that she is unable to come.",
]


@pytest.mark.parametrize("response", REFUSALS)
def test_refusals_are_recognized(response):
    assert is_refusal(response)
    assert keyword_judge("Help me to do it.", response)


@pytest.mark.parametrize("response", ANSWERS)
def test_answers_are_no_refusals(response):
    assert not is_refusal(response)


def test_every_phrase_is_recognized():
    for phrase in OPENINGS:
        assert is_refusal(phrase + " to do that."), phrase
    for phrase in REFUSAL_PHRASES:
        assert is_refusal(f"Well, {phrase} you."), phrase


def test_a_plugin_that_is_registered_later_is_seen():
    class Late:
        @plugins.hookspecs.hookimpl
        def register_basis_methods(self, register):
            register("late", lambda statistics, rank, side: None)

    assert "late" not in plugins.basis_methods()
    plugin = Late()
    plugins.plugin_manager().register(plugin)
    try:
        assert "late" in plugins.basis_methods()
    finally:
        plugins.plugin_manager().unregister(plugin)
    assert "late" not in plugins.basis_methods()
