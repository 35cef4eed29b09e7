"""The one place where a script ends: exit status, one line, no traceback for what the user can mend."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from sparsity.system import errors
from sparsity.system.errors import UserError, command_line, run_main

MEMORY = "error: out of memory; use a smaller --batch_size, network or image\n"
STOPPED = "\ninterrupted; to go on: again\n"


def stop_by(number):
    def work():
        os.kill(os.getpid(), number)
        raise AssertionError("the signal should have arrived")

    return work


def fail(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        (lambda: None, 0, ""),
        (fail(UserError("two\nlines")), 1, "error: two lines\n"),
        (fail(KeyboardInterrupt()), 130, STOPPED),
        (stop_by(signal.SIGINT), 130, STOPPED),
        (stop_by(signal.SIGTERM), 143, STOPPED),
        (fail(torch.OutOfMemoryError("CUDA out of memory")), 1, MEMORY),
        (fail(MemoryError()), 1, MEMORY),
        (lambda: torch.empty(2**50), 1, MEMORY),
        (fail(OSError(28, "No space left on device")), 1, "error: [Errno 28] No space left on device\n"),
        (
            fail(RuntimeError("x has no kernel, but you set 'torch.use_deterministic_algorithms(True)'")),
            1,
            "error: x has no kernel; use another --device, or leave --deterministic out\n",
        ),
    ],
)
def test_errors_are_printed_in_one_place(capsys, work, status, said):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_main(work, lambda: "again") == status
    assert capsys.readouterr().err == said
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_errors_of_the_program_itself_are_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(fail(RuntimeError("a bug")), lambda: "")


def test_the_command_that_goes_on_is_that_of_the_run(monkeypatch):
    assert command_line("run.py", ["--name", "a b"], "--resume") == "python run.py --name 'a b' --resume"
    assert command_line("run.py", ["--resume"], "--resume") == "python run.py --resume"
    monkeypatch.setattr(errors, "PROCESSES", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line("run.py", []) == "torchrun --nproc_per_node=4 run.py"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_line("run.py", []) == "torchrun --nnodes=2 ... --nproc_per_node=2 run.py"


@pytest.mark.parametrize(
    ("script", "flags", "status", "said"),
    [
        ("run.py", ["--help"], 0, "--epochs"),
        ("pruning.py", ["--help"], 0, "what to prune"),
        ("run.py", ["--epochs", "0"], 2, "'0' is not a whole number from 1"),
        ("pruning.py", ["--levels", "forty"], 2, "neither a rising start:stop:step"),
    ],
)
def test_help_and_usage_errors_answer_without_torch(script, flags, status, said):
    """A stand-in for torch that fails is found first, and is never met."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT / script), *flags], capture_output=True, text=True)
    assert result.returncode == status
    assert said in result.stdout + result.stderr
    assert result.stderr.count("\n") == (status == 2)
    assert "Traceback" not in result.stderr


def test_a_reader_that_is_gone_ends_the_run_in_silence():
    code = "from sparsity.system.errors import run_main\nexit(run_main(lambda: print('x' * 10**6, flush=True), str))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (1, b"")
