import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Otherwise older releases of torch start processes for a compiler that no test uses, wherever it is imported.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Fixtures of modules and sessions run before the one below.
os.environ["SALORA_CACHE"] = tempfile.mkdtemp(prefix="salora-cache-")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))  # benchmarks

pytest_plugins = ["compatibility_table"]

# The files that take longest. They come first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_axolotl.py",
    "test_evaluate.py",
    "test_trainers.py",
    "test_replay.py",
    "test_scale_out.py",
    "test_axolotl_in_processes.py",
    "test_real_models.py",
    "test_demo.py",
    "test_distribution.py",
    "test_architecture.py",
    "test_trl.py",
    "test_compatibility.py",
    "test_calibration.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="module", autouse=True)
def hosts_are_no_garbage() -> None:
    """
    Trainers collect garbage again and again, among all that was imported; what is there before the tests of a file is
    not looked through any more.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """
    No test leaves environment variables to the next: `torch_compile=True` would have every later trainer of this
    process, and of those that it starts, compile its model, too.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory) -> Path:
    """No test takes a calibration from another, nor from the user."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SALORA_CACHE", str(folder))
    return folder
