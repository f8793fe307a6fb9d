"""`salora calibrate` and `salora inspect` on a small model on disk."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

import fresh
from salora_plugins import SafetyModule, calibrate
from salora_plugins.cli import create_cli
from tiny import llama, refusal_rows, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "refusals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refusal_rows()))
    return folder


def run(*arguments):
    return CliRunner().invoke(create_cli(), [str(argument) for argument in arguments])


def calibration(folder, out, *more):
    data = folder / "refusals.jsonl"
    return ["calibrate", "--model", folder / "model", "--safety-data", data, "--out", out, *more]


def test_calibrate_writes_what_the_function_computes(folder, tmp_path):
    options = ("--target-modules", "q_proj,v_proj", "--safety-rank", "8", "--input-safety-rank", "0.4")
    options += ("--safety-rank-pattern", "v_proj=4")
    result = run(*calibration(folder, tmp_path / "new" / "a.safetensors", *options))
    assert result.exit_code == 0, result.output
    assert "4 modules, 4 to 8 (mean 6.0) output directions each, which capture" in result.output
    found = SafetyModule.load(tmp_path / "new" / "a.safetensors")
    expected = calibrate(
        llama(),
        tokenizer(),
        safety_data=str(folder / "refusals.jsonl"),
        target_modules=["q_proj", "v_proj"],
        safety_rank=8,
        input_safety_rank=0.4,
        safety_rank_pattern={"v_proj": 4},
        calibration_cache=False,
    )
    assert all(torch.equal(found.bases[name], basis) for name, basis in expected.bases.items())
    assert all(torch.equal(found.input_bases[name], basis) for name, basis in expected.input_bases.items())


@pytest.mark.parametrize(
    ("given", "count"),
    [(("--target-modules", "all-linear"), 14), (("--target-modules", r".*\.1\.self_attn\.[qk]_proj"), 2), ((), 4)],
)
def test_target_modules(folder, tmp_path, given, count):
    assert run(*calibration(folder, tmp_path / "a.safetensors", "--safety-rank", "8", *given)).exit_code == 0
    assert len(SafetyModule.load(tmp_path / "a.safetensors").bases) == count


def test_several_sources(folder, tmp_path):
    (tmp_path / "more.jsonl").write_text((folder / "refusals.jsonl").read_text().replace("harm", "damage"))
    more = ("--safety-data", tmp_path / "more.jsonl", "--safety-rank", "8")
    assert run(*calibration(folder, tmp_path / "a.safetensors", *more)).exit_code == 0
    counts = SafetyModule.load(tmp_path / "a.safetensors").provenance["safety_sources"]
    assert set(counts) == {str(folder / "refusals.jsonl"), str(tmp_path / "more.jsonl")} and min(counts.values()) > 0
    result = run(*calibration(folder, tmp_path / "b.safetensors", "--safety-data", "How do I steal a car?"))
    assert "--safety-data How do I steal a car?: this is neither a registered data source" in str(result.exception)


def test_a_second_run_says_that_it_used_the_cache(folder, tmp_path, caplog):
    caplog.set_level("INFO", "salora_plugins")
    for name in ("a", "b"):
        assert run(*calibration(folder, tmp_path / f"{name}.safetensors", "--safety-rank", "8")).exit_code == 0
    assert caplog.text.count("from the cache") == 1
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--safety-rank", "many"), "--safety-rank='many': give a whole number of at least 1, or a share"),
        (
            ("--safety-rank-pattern", "v_proj=leak:0.1"),
            "--safety-rank-pattern['v_proj']='leak:0.1': give a whole",
        ),
        (("--safety-rank", "1.5"), "--safety-rank=1.5: give a whole number of at least 1, or a share"),
        (("--safety-rank-pattern", "v_proj"), "--safety-rank-pattern v_proj: give MODULE=RANK"),
        (("--load-in-4bit", "--load-in-8bit"), "--load-in-4bit and --load-in-8bit are both given"),
        (
            ("--target-modules", "nothing"),
            "no module of LlamaForCausalLM. Its linear layers are called q_proj, k_proj",
        ),
        (("--engine", "fast"), "--engine='fast': choose one of"),
    ],
)
def test_wrong_options(folder, tmp_path, more, message):
    result = run(*calibration(folder, tmp_path / "a.safetensors", *more))
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert not (tmp_path / "a.safetensors").exists()


def test_an_option_that_takes_one_value_is_not_taken_twice(folder, tmp_path):
    twice = run(*calibration(folder, tmp_path / "a.safetensors", "--safety-rank", "4", "--safety-rank", "8"))
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", twice.output).split())
    assert twice.exit_code == 2 and "'--safety-rank'" in told and "given 2 times" in told
    repeatable = ("--safety-rank", "4", "--target-modules", "q_proj", "--target-modules", "v_proj")
    assert run(*calibration(folder, tmp_path / "a.safetensors", *repeatable)).exit_code == 0


def test_inspect_shows_ranks_energy_and_provenance(folder, tmp_path):
    file, plot = tmp_path / "a.safetensors", tmp_path / "plots" / "a.png"
    assert run(*calibration(folder, file, "--safety-rank", "8", "--input-safety-rank", "4")).exit_code == 0
    result = run("inspect", file, "--plot", plot)
    assert result.exit_code == 0, result.output
    for part in ("captured", "4 modules, 8 output directions each", "4 input directions each", "16 examples"):
        assert part in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    described = json.loads(run("inspect", file, "--json").output)
    side = described["modules"]["model.layers.1.self_attn.v_proj"]["input"]
    assert (side["dimension"], side["rank"], len(side["singular_values"])) == (64, 4, 4)
    assert 0 < side["captured_energy"] < 1
    assert described["provenance"]["safety_samples"] == 16
    missing = run("inspect", tmp_path / "none.safetensors")
    assert isinstance(missing.exception, FileNotFoundError)


# Every batch takes a while, for the signal to fall into one.
SLOWLY = """
import shutil
import signal
import time
from salora_plugins.rows import batching
from salora_plugins.cli import main

collate = batching.collate

def slow_collate(*arguments):
    print("batch", flush=True)
    time.sleep(0.5)
    return collate(*arguments)

batching.collate = slow_collate
# A shell that runs the tests in the background lets its processes ignore the signal of Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_cleanly(folder, tmp_path, tmp_path_factory):
    out = tmp_path / "a.safetensors"
    arguments = calibration(folder, out, "--batch-size", "1", "--safety-rank", "8", "--target-modules", "all-linear")
    said, errors = tmp_path_factory.mktemp("said") / "stdout", tmp_path_factory.mktemp("said") / "stderr"
    process = fresh.start(["-c", SLOWLY, *arguments], stdout=said, stderr=errors)
    deadline = time.monotonic() + 300
    while not (said.is_file() and said.read_text().startswith("batch\n")):
        assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (1, 130)
    assert "Traceback" not in errors.read_text()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_safety_module_is_not_replaced(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    for file in (weights, folder / "refusals.jsonl"):
        result = run(*calibration(folder, file))
        assert isinstance(result.exception, FileExistsError) and "is no safety module" in str(result.exception)
    assert weights.read_bytes() == before


def test_a_place_that_cannot_be_written_to_is_refused_before_the_calibration_and_nothing_is_left(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run(*calibration(folder, tmp_path / "file" / "new" / "a.safetensors"))
    assert isinstance(result.exception, NotADirectoryError) and f"{tmp_path / 'file'} is a file" in str(
        result.exception
    )
    assert run(*calibration(folder, tmp_path / "new" / "a.safetensors", "--target-modules", "nothing")).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "{adapter}", "--plot", "{adapter}/adapter_model.safetensors"], "a plot is a PNG file"),
        (["inspect", "{adapter}", "--plot", "{adapter}/salora"], "a plot is a PNG file"),
        (["compare", "{adapter}", "--out", "{adapter}/page.pdf"], "a page ends in .html"),
    ],
)
def test_other_endings_than_those_of_what_is_written_are_refused(tmp_path, arguments, message):
    result = run(*(argument.format(adapter=tmp_path) for argument in arguments))
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert result.exit_code in (1, 2) and message in f"{told} {result.exception}"


def test_what_is_no_model_is_told_by_what_it_is(folder, tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    arguments = calibration(folder, tmp_path / "a.safetensors")
    for given, message in {
        tmp_path / "adapter": "holds an adapter",
        folder / "refusals.jsonl": "is a file. Name the folder of the model",
        "gone": "gone: there is no such folder (looked in",
        "./gone": "./gone: there is no such folder, and it is not the name",
    }.items():
        arguments[2] = given
        result = run(*arguments)
        assert isinstance(result.exception, (OSError, ValueError)) and message in str(result.exception)


def test_an_update_of_zero_is_told(folder, tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert run(*calibration(folder, tmp_path / "a.safetensors", "--safety-rank", "8")).exit_code == 0
    result = run("audit", tmp_path / "adapter", "--safety-module", tmp_path / "a.safetensors")
    assert result.exit_code == 0 and "The update is zero: this adapter changes nothing" in result.output
