"""
Programs that tests run in processes of their own.

Importing torch, Transformers, PEFT and TRL takes twenty seconds, and the tests start dozens of processes. A template
process imports them once; every program runs in a fork of it, where neither this package nor a test was ever imported.
Where processes cannot be forked, or must not be since there is a GPU, each is started as usual.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HOSTS = ("torch", "transformers", "peft", "datasets", "accelerate", "trl", "trl.trainer.sft_trainer")


class Process:
    """A program in a fork of the template, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, template: _Template, pid: int) -> None:
        self.pid, self._template = pid, template
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._template.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Template:
    """The process that is forked; it lives as long as this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, "the template process has ended"
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@functools.cache
def _template() -> _Template | None:
    import torch

    return _Template() if hasattr(os, "fork") and not torch.cuda.is_available() else None


def start(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdout: str | Path = os.devnull,
    stderr: str | Path = os.devnull,
) -> Process | subprocess.Popen:
    """
    Start a program.

    Args:
        arguments: As for `python`: `["-c", code, ...]`, `["-m", module, ...]` or `[file, ...]`.
        env: Its environment, instead of this process's. What the hosts read when they are imported is the template's.
        cwd: Its folder.
        stdout: The file that it writes to.
        stderr: The file for errors.
    """
    texts = [str(argument) for argument in arguments]
    environment = dict(os.environ if env is None else env)
    folder = str(cwd or os.getcwd())
    template = _template()
    if template is not None:
        request = {"arguments": texts, "env": environment, "cwd": folder, "stdout": str(stdout), "stderr": str(stderr)}
        return Process(template, template.ask(request))
    with open(stdout, "w") as out, open(stderr, "w") as errors:
        return subprocess.Popen([sys.executable, *texts], env=environment, cwd=folder, stdout=out, stderr=errors)


def run(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 600,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does; see [`start`]. A failure that is checked shows its errors."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        code = start(arguments, env=env, cwd=cwd, stdout=out, stderr=errors).wait(timeout=timeout)
        result = subprocess.CompletedProcess([*map(str, arguments)], code, out.read_text(), errors.read_text())
    assert not check or code == 0, f"{result.args}: exit code {code}\n{result.stdout}{result.stderr}"
    return result


def _serve() -> None:
    """The template: one request a line, answered by a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in HOSTS:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] in ("salora_plugins", "tiny", "axolotl") for name in sys.modules)
    path = list(sys.path[1:])
    while line := sys.stdin.readline():
        request = json.loads(line)
        answer: int | None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                _become(request, path)
        print(json.dumps(answer), file=answers, flush=True)


def _become(request: dict[str, Any], path: list[str]) -> None:
    """Run the program of a request as `python` would, and end this process with its exit code."""
    import runpy
    import traceback

    # A program's objects live until the process ends: torch 2.7 can hang where the last reference to a group of
    # processes is DistributedDataParallel's, since its thread then waits for the interpreter that waits for it.
    kept: dict[str, Any] = {}
    code = 1
    try:
        for descriptor, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND if descriptor else os.O_RDONLY)
            os.dup2(file, descriptor)
            os.close(file)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        first, *rest = request["arguments"]
        added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [*(entry for entry in added if entry and entry not in path), *path]
        importlib.invalidate_caches()
        if first == "-c":
            sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            kept = vars(main)
            exec(compile(rest[0], "<string>", "exec"), kept)
        elif first == "-m":
            sys.argv, sys.path[:0] = rest, [""]
            kept = runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = [first, *rest], [str(Path(first).parent)]
            kept = runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    _serve()
