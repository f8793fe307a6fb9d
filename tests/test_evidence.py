"""That the tables of docs/evidence are what the benchmarks compute from the published runs."""

import pytest

from benchmarks import calibration, sails, smollm2_results, tables
from benchmarks.real_models import summary as real_models
from benchmarks.retention import comparison, summary
from benchmarks.retention.comparison import COMPARED
from benchmarks.retention.experiment import PUBLISHED, Results, spread
from benchmarks.retention.methods import METHODS
from benchmarks.runs import MERGED, write_json, write_runs

COMMANDS = {
    "python -m benchmarks.retention summary --write": summary,
    "python -m benchmarks.retention comparison": comparison,
    "python -m benchmarks.real_models summary --write": real_models,
    "python -m benchmarks.smollm2_results --summary --write": smollm2_results,
    "python -m benchmarks.calibration table --write": calibration,
    "python -m benchmarks.sails write": sails,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_tables(command):
    module = COMMANDS[command]
    for name, table in module.document_tables().items():
        shown = tables.shown(module.DOCUMENT, name)
        assert shown == table, f"{module.DOCUMENT.name}, table {name!r}: run `{command}`"


def test_publishing_adds_to_what_is_there(tmp_path):
    """Runs of one file each join the merged file, and none is lost; those of another base model are refused."""
    published, measured, other = (Results(tmp_path / name) for name in ("published", "measured", "other"))
    for results, loss in ((published, 1.0), (measured, 1.001), (other, 1.5)):
        write_json(results.base_path, {"loss": {"math": loss}, "refused": {}})
    write_runs(published.folder / MERGED, {"a": {"points": [1]}, "c": {"points": [0.1 + 0.2]}})
    measured.write("b", {"points": ["Δ"]})
    measured.write("a", {"points": [1, 2]})
    measured.publish_to(published)
    expected = {"a": {"points": [1, 2]}, "b": {"points": ["Δ"]}, "c": {"points": [0.1 + 0.2]}}
    assert list(published.runs().items()) == list(expected.items())
    assert published.base()["loss"] == {"math": 1.0}
    with pytest.raises(ValueError, match="of another model: its loss on math"):
        other.publish_to(published)


PUBLISHED_RESULTS = [PUBLISHED, *(path.parent for path in COMPARED.glob("*/base.json"))]


@pytest.mark.parametrize("folder", PUBLISHED_RESULTS, ids=lambda folder: folder.name)
def test_published_runs_say_what_their_methods_are(folder):
    runs = Results(folder).runs()
    assert len(runs) >= (66 if folder == PUBLISHED else 9)
    for name, run in runs.items():
        assert name == f"{run['task']}-{run['method']}-lr{run['learning_rate']:g}-seed{run['seed']}"
        assert run.get("options", METHODS[run["method"]].options) == METHODS[run["method"]].options, name


def test_requests_are_spread_over_their_set():
    """So many, all different, in their order, of every part of the set; all where there are fewer."""
    entries = [str(number) for number in range(10)]
    assert spread(entries, 4) == ["0", "2", "5", "7"]
    assert spread(entries, 10) == spread(entries, 99) == entries


def test_comparison_counts_what_was_asked(tmp_path):
    """Refusals of both seeds over what both were asked; a row a method, in the order of the page."""
    asked = {"advbench": 4, "builtin": 2, "harmless": 5}

    def point(loss, refused):
        counts = dict(zip(asked, refused, strict=True))
        return {"step": 3, "loss": loss, "refused": counts, "broken": dict.fromkeys(asked, 0), "requests": asked}

    results = Results(tmp_path)
    write_json(results.base_path, point(2.0, (4, 2, 1)) | {"loss": {"sure": 2.0}})
    for method, seed, loss, refused in (
        ("two-sided", 0, 1.5, (4, 2, 1)),
        ("lora", 0, 1.0, (1, 0, 0)),
        ("lora", 1, 1.2, (2, 1, 0)),
    ):
        run = {"task": "sure", "method": method, "learning_rate": 1e-3, "seed": seed, "points": [point(loss, refused)]}
        results.write(f"sure-{method}-lr0.001-seed{seed}", run)
    lines = comparison.comparison(results).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["before", "LoRA", "default"]
    assert "| 2 | 1.100 (1.000 to 1.200) | 3 of 8 [" in lines[3]
