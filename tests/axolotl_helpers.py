"""Runs Axolotl for test_axolotl.py: `python axolotl_helpers.py job.json`, everything in one process of its own.

Importing Axolotl takes most of a minute and changes its host libraries for good, so that the tests neither import
it themselves nor start it once for every run. A job is a JSON object with:

- `result`: file to write the answers to;
- `validate`: name -> YAML file; each is loaded as `axolotl train` loads it, up to where the model would be;
- `commands`: name -> arguments of `axolotl`; `without_plugin`: names of those that must not see the plugin;
  `killed`: name -> file, for those whose process is to kill itself when it is about to write that file.

The answers are `errors` (name -> text, or null where there was none), `failed` (name -> traceback, or null),
`imported` (modules that the plugin's import added) and `loaded` (name -> the config's keys).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

PLUGIN = "salora_plugins.integrations.axolotl.plugin"


def main(job_file: str) -> None:
    """Work through a job file; a failing command does not stop the ones after it."""
    job = json.loads(Path(job_file).read_text())
    answers: dict = {"errors": {}, "failed": {}, "loaded": {}}

    import axolotl.integrations.base as host
    from axolotl.cli.config import load_cfg
    from axolotl.cli.main import cli

    before = set(sys.modules)
    importlib.import_module(PLUGIN)
    answers["imported"] = sorted(set(sys.modules) - before)

    environment = dict(os.environ)
    for name, file in job["validate"].items():
        # A validation leaves variables behind, as a run does: with those of ZeRO 3 later runs would need DeepSpeed.
        os.environ.clear()
        os.environ.update(environment)
        try:
            cfg = load_cfg(file)
            host.PluginManager.get_instance().pre_model_load(cfg)
            answers["errors"][name] = None
            answers["loaded"][name] = {key: str(value) for key, value in cfg.items()}
        except Exception as error:
            answers["errors"][name] = str(error)

    entry_points = host.entry_points
    for name, arguments in job["commands"].items():
        # Axolotl and its hosts collect garbage at every turn, among all that they imported: most of the time of a run.
        gc.collect()
        gc.freeze()
        print(f"=== axolotl {' '.join(arguments)}", flush=True)
        # A run leaves variables behind; with those of torch_compile every later one would compile its model.
        os.environ.clear()
        os.environ.update(environment)
        hidden = name in job["without_plugin"]
        host.entry_points = (lambda group: ()) if hidden else entry_points
        host.reset_plugin_entry_points_cache()
        host.PluginManager.get_instance().plugins.clear()
        if name in job["killed"]:
            answers["failed"][name] = run_and_kill(lambda a=arguments: cli.main(a, standalone_mode=False), job, name)
            continue
        try:
            cli.main(arguments, standalone_mode=False)
            answers["failed"][name] = None
        except BaseException:
            answers["failed"][name] = traceback.format_exc()
        Path(job["result"]).write_text(json.dumps(answers))


def run_and_kill(run: Callable[[], None], job: dict, name: str) -> str | None:
    """Run in a child that sends itself SIGKILL; returns what went wrong with that."""
    child = os.fork()
    if child == 0:
        from interrupted_training import kill_before

        kill_before(job["killed"][name])
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return None if killed else f"was not killed: status {status}"


if __name__ == "__main__":
    main(sys.argv[1])
