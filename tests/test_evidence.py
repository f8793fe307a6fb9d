"""That the tables of docs/evidence are what the benchmarks compute from the published runs."""

import pytest

from benchmarks import calibration, smollm2_results, tables
from benchmarks.retention import summary
from benchmarks.retention.experiment import PUBLISHED, Results
from benchmarks.retention.methods import METHODS

COMMANDS = {
    "python -m benchmarks.retention summary --write": summary,
    "python -m benchmarks.smollm2_results --summary --write": smollm2_results,
    "python -m benchmarks.calibration table --write": calibration,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_tables(command):
    module = COMMANDS[command]
    for name, table in module.document_tables().items():
        shown = tables.shown(module.DOCUMENT, name)
        assert shown == table, f"{module.DOCUMENT.name}, table {name!r}: run `{command}`"


def test_published_runs_say_what_their_methods_are():
    runs = Results(PUBLISHED).runs()
    assert len(runs) >= 66
    for name, run in runs.items():
        assert name == f"{run['task']}-{run['method']}-lr{run['learning_rate']:g}-seed{run['seed']}"
        assert run.get("options", METHODS[run["method"]].options) == METHODS[run["method"]].options, name
