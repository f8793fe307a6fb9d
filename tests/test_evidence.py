"""That the tables of docs/evidence are what the benchmarks compute from the published runs."""

import pytest

from benchmarks import calibration, sails, smollm2_results, tables
from benchmarks.real_models import summary as real_models
from benchmarks.retention import summary
from benchmarks.retention.experiment import PUBLISHED, Results
from benchmarks.retention.methods import METHODS
from benchmarks.runs import MERGED, write_json, write_runs

COMMANDS = {
    "python -m benchmarks.retention summary --write": summary,
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


def test_published_runs_say_what_their_methods_are():
    runs = Results(PUBLISHED).runs()
    assert len(runs) >= 66
    for name, run in runs.items():
        assert name == f"{run['task']}-{run['method']}-lr{run['learning_rate']:g}-seed{run['seed']}"
        assert run.get("options", METHODS[run["method"]].options) == METHODS[run["method"]].options, name
