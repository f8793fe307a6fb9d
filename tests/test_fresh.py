"""Programs of tests run as `python` would run them."""

from __future__ import annotations

import os
import signal

import pytest

import fresh

PROGRAM = """
import os, sys
assert not any(name.partition(".")[0] in ("salora_plugins", "tiny", "pytest") for name in sys.modules), "not fresh"
print(os.getcwd(), sys.argv[1:], os.environ.get("SALORA_TEST"), __name__, sys.modules["__main__"].PROGRAM)
print("error", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["code", "module", "file"])
def test_arguments_folder_environment_output_and_exit_code(kind, tmp_path):
    program = f"PROGRAM = 1{PROGRAM}"
    (tmp_path / "program_of_a_test.py").write_text(program)
    how = {"code": ["-c", program], "module": ["-m", "program_of_a_test"], "file": [tmp_path / "program_of_a_test.py"]}
    result = fresh.run([*how[kind], "a", "b c"], cwd=tmp_path, env={**os.environ, "SALORA_TEST": "x"})
    assert (result.returncode, result.stderr) == (3, "error\n")
    assert result.stdout == f"{tmp_path} ['a', 'b c'] x __main__ 1\n"
    with pytest.raises(AssertionError, match="exit code 3"):
        fresh.run([*how[kind]], cwd=tmp_path, check=True)


def test_what_one_program_does_another_does_not_see():
    assert fresh.run(["-c", "import salora_plugins, os; os.environ['SALORA_TEST'] = 'left'"]).returncode == 0
    left = fresh.run(["-c", "import os, sys; print('salora_plugins' in sys.modules, os.environ.get('SALORA_TEST'))"])
    assert left.stdout == "False None\n"


def test_an_exception_and_a_signal_are_seen(tmp_path):
    assert "ValueError: here" in fresh.run(["-c", "raise ValueError('here')"]).stderr
    process = fresh.start(["-c", "import time; time.sleep(600)"])
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
