"""The set-up of the environment: its plan, how it knows what is done, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.driving import load_tool


@pytest.fixture
def setup_env():
    return load_tool("setup_env")


def titles(steps):
    return [step.title for step in steps]


def test_the_plan_grows_once_torch_is_known(setup_env):
    first, whole = setup_env.plan(None), setup_env.plan(False)
    assert titles(whole)[: len(first)] == titles(first)
    assert any("mmcv" in title for title in titles(whole))
    assert whole[-1].arguments[-1] == str(setup_env.ROOT)
    versions = {
        has_cuda: next(s for s in setup_env.plan(has_cuda) if s.title == "torchvision") for has_cuda in (0, 1)
    }
    assert "torchvision-cpu.txt" in versions[0].arguments[-1]
    assert "torchvision-cuda.txt" in versions[1].arguments[-1]


def test_every_list_of_requirements_is_used_and_pinned(setup_env):
    plans = [setup_env.plan(flag, stack) for flag in (False, True) for stack in setup_env.STACKS]
    used = {Path(arg).name for steps in plans for step in steps for arg in step.arguments}
    lists = sorted(setup_env.REQUIREMENTS.glob("*.txt"))
    assert {path.name for path in lists} <= used
    for path in lists:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        unpinned = [line for line in lines if "==" not in line]
        assert unpinned in ([], ["requests"])


def test_a_changed_pin_changes_its_step_and_all_that_follow(setup_env, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name}==1\n")
    steps = [setup_env.Step(name, ["-r", str(tmp_path / f"{name}.txt")], "pass") for name in ("one", "two")]

    def keys():
        first = setup_env.fingerprint("", steps[0])
        return first, setup_env.fingerprint(first, steps[1])

    before = keys()
    assert keys() == before
    (tmp_path / "two.txt").write_text("two==2\n")
    assert keys()[0] == before[0]
    assert keys()[1] != before[1]
    (tmp_path / "two.txt").write_text("two==1\n")
    (tmp_path / "one.txt").write_text("one==2\n")
    assert all(new != old for new, old in zip(keys(), before))


def test_steps_that_are_done_are_not_run_again(setup_env, tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(setup_env, "run_logged", lambda command, log, environment: ran.append(command) or 0)
    steps = [setup_env.Step("one", ["a"], "import a"), setup_env.Step("two", ["b"], "import b")]
    setup_env.run_steps(steps, 2, Path("python"), tmp_path)
    assert [command[-1] for command in ran] == ["a", "import a", "b", "import b"]
    ran.clear()
    setup_env.run_steps(steps, 2, Path("python"), tmp_path)
    assert ran == []
    assert capsys.readouterr().out.count("done in") == 2


def test_a_failed_step_ends_it_with_its_log(setup_env, tmp_path, monkeypatch, capsys):
    def fail(command, log, environment):
        log.write_text("gcc: no such file\n")
        return 1

    monkeypatch.setattr(setup_env, "run_logged", fail)
    with pytest.raises(SystemExit, match="setup failed at: one"):
        setup_env.run_steps([setup_env.Step("one", ["a"], "pass")], 1, Path("python"), tmp_path)
    assert "gcc: no such file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.done"))


def test_output_goes_to_the_log(setup_env, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import os; print(os.environ['LF_WORD']); raise SystemExit(3)"]
    assert setup_env.run_logged(command, log, {"LF_WORD": "hello"}) == 3
    assert log.read_text() == "hello\n"


def test_what_a_machine_lacks_is_said_first(setup_env, monkeypatch):
    setup_env.check_machine()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match=r"needs a C\+\+ compiler"):
        setup_env.check_machine()
    monkeypatch.setattr(setup_env.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(SystemExit, match="Python's headers"):
        setup_env.check_machine()
    monkeypatch.setattr(setup_env, "MIN_PYTHON", (99, 0))
    with pytest.raises(SystemExit, match="needs Python 99"):
        setup_env.check_machine()


def test_two_setups_of_one_environment(setup_env, tmp_path):
    folder = tmp_path / ".venv"
    with (
        setup_env.locked(folder),
        pytest.raises(SystemExit, match=r"setup is at work on .*venv already"),
        setup_env.locked(folder),
    ):
        pass
    # Making the environment anew empties the folder, and must not lose the lock.
    with setup_env.locked(folder):
        setup_env.venv.EnvBuilder(with_pip=False, clear=True).create(folder)
        with pytest.raises(SystemExit, match="already"), setup_env.locked(folder):
            pass
    with setup_env.locked(folder):
        pass


def test_what_a_killed_setup_started_keeps_the_lock(setup_env, tmp_path):
    folder = tmp_path / ".venv"
    code = f"import sys; sys.path.insert(0, {str(setup_env.ROOT / 'tools')!r}); import os, setup_env\n"
    code += f"from pathlib import Path\nwith setup_env.locked(Path({str(folder)!r})):\n"
    code += "    command = [sys.executable, '-c', 'print(\"up\", flush=True); input()']\n"
    code += f"    setup_env.run_logged(command, Path({str(tmp_path / 'log')!r}), {{}})"
    setup = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "log").is_file() or not (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        setup.kill()
        setup.wait()
        with pytest.raises(SystemExit, match="already"), setup_env.locked(folder):
            pass
    finally:
        setup.stdin.close()
    while time.monotonic() < deadline:
        with contextlib.suppress(SystemExit), setup_env.locked(folder):
            return
        time.sleep(0.05)
    pytest.fail("the lock outlived all that held it")


@pytest.mark.parametrize(
    ("line", "clause"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying: NewConnectionError(': [Errno 111] Connection refused')", "does not answer"),
        ("Read timed out. (read timeout=15)", "does not answer"),
        ("ERROR: No matching distribution found for torch==9.9", "has no torch==9.9 for this Python"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
    ],
)
def test_a_log_says_what_the_machine_lacks(setup_env, line, clause):
    assert clause in setup_env.diagnose(["Collecting torch", line, "see above for output from the failure."])


def test_an_error_of_the_package_itself_is_not_laid_on_the_machine(setup_env):
    assert setup_env.diagnose(["ops.cpp:3: error: expected ';' before '}' token"]) == ""
