"""What README, docs/start.md and docs/use.md tell a newcomer to write: the code blocks are run as they stand."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from certificate import largest_share_inside
from salora_plugins import SaLoRAModel
from salora_plugins.cli import create_cli
from tiny import relative_difference, sum_rows, token_batch

ROOT = Path(__file__).parents[1]
MODEL = str(files("salora_plugins.demo") / "model")
NAMES = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer, "PeftModel": PeftModel}


def block(page: str, *words: str) -> str:
    """The one Python block of a page with these words in it, of the demo's model, and with a quick calibration."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [text for text in blocks if all(word in text for word in words)]
    found = found.replace("SaLoRAConfig(", "SaLoRAConfig(num_safety_samples=32, ")
    return re.sub(r'^name = ".*"$', f"name = {MODEL!r}", found, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the block for transformers' own Trainer was run."""
    folder = tmp_path_factory.mktemp("first_hour")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [tokenizer(f"What is {i} plus {i}? It is {2 * i}.") for i in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        exec(block("docs/start.md", "DataCollatorForLanguageModeling"), {"rows": rows})
    return folder


def test_transformers_trainer(trained):
    assert largest_share_inside(trained / "outputs") <= 1e-5
    result = CliRunner().invoke(create_cli(), ["audit", str(trained / "outputs")])
    assert result.exit_code == 0 and "Outside: no module has more than" in result.output


def test_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in sum_rows()]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = block("README.md", "SFTTrainer(")
    for hub, here in {
        '"trl-lib/Capybara"': '"json", data_files="rows.jsonl"',
        '"HuggingFaceTB/SmolLM2-1.7B-Instruct"': repr(MODEL),
        'output_dir="outputs"': 'output_dir="outputs", use_cpu=True, report_to="none"',
    }.items():
        assert hub in text
        text = text.replace(hub, here)
    exec(text, {})
    assert largest_share_inside(Path("outputs")) <= 1e-5
    # What README goes on with.
    names = {"base_model": AutoModelForCausalLM.from_pretrained(MODEL), "PeftModel": PeftModel}
    exec(block("README.md", "plain PEFT"), names)
    assert isinstance(names["model"], PeftModel)


def test_continue_training(trained, monkeypatch):
    monkeypatch.chdir(trained)
    names = {"base_model": AutoModelForCausalLM.from_pretrained(MODEL)}
    exec(block("docs/start.md", "load_for_training"), names)
    assert isinstance(names["model"].base_model, SaLoRAModel)


def test_merge(trained, monkeypatch):
    monkeypatch.chdir(trained)
    exec(block("docs/use.md", "merge_and_unload"), {**NAMES, "name": MODEL})
    tokens = token_batch()
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before = base(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(tokens).logits
    adapted = PeftModel.from_pretrained(base, "outputs")(tokens).logits
    assert relative_difference(merged, adapted) < 1e-5 < relative_difference(merged, before)
    assert AutoTokenizer.from_pretrained("merged").chat_template
