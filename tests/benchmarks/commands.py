"""Commands of which gpu_hour.py is made: each with a log, a limit and a record, and what is read from its files."""

import argparse
import csv
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sparsity.system import errors, files, machine
from sparsity.system.errors import UserError

ROOT = Path(__file__).parents[2]
LAST_LINES = 12
SHORTEST = 5.0  # seconds that a command is worth starting for
EPOCH_LINE = re.compile(r"^Epoch: (\d+) .*Test accuracy: ([\d.]+)% \| Epoch Time: ([\d.]+) secs", re.MULTILINE)


@dataclass
class Hour:
    """One run of this script: its flags, what was found so far, and when the stage at work has to end."""

    args: argparse.Namespace
    figures: dict[str, Any] = field(default_factory=dict)  # name of a command or a result -> what it gave
    commands: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> command, status, seconds, date, machine
    missing: dict[str, list[str]] = field(default_factory=dict)  # number of a stage that was run -> what is not done
    stage: int = 0
    deadline: float = 0.0

    def miss(self, what: str) -> None:
        """Take down what the stage at work could not do."""
        self.missing[str(self.stage)].append(what)

    def path(self, *parts: str) -> Path:
        return self.args.out.joinpath(*parts)

    def read(self) -> None:
        """Go on from figures.json, where there is one; UserError where it cannot be read."""
        known = self.path("figures.json")
        try:
            there = json.loads(known.read_text()) if known.exists() else {}
            self.figures, self.commands = there.get("figures", {}), there.get("commands", {})
            self.missing = there.get("missing", {})
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{known} cannot be read ({errors.one_line(error)}); remove it or choose another --out"
            ) from error

    def write(self) -> None:
        """Bring figures.json up to date."""
        content = {
            "command": errors.command_line(sys.argv[0], sys.argv[1:]),
            "date": now(),
            "versions": machine.versions(),
            "machine": machine.machine(machine.resolve_device("auto")),
            "missing": self.missing,
            "figures": self.figures,
            "commands": self.commands,
        }
        files.write_json(self.path("figures.json"), content)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def call(hour: Hour, name: str, words: list[object], goes_on: bool = False) -> str | None:
    """Run a Python command until the stage's limit, its output in a log; that output, or None unless it succeeded.

    A command that was done before is not run again, except by `--again` one that does not go on where it was: then what
    is in its log is returned. The seconds of one that goes on are those of all its pieces.
    """
    log, command = hour.path("logs", f"{name}.log"), [str(word) for word in words]
    before = hour.commands.get(name, {"status": "", "command": []})
    same = set(before["command"]) ^ set(command) <= {"--resume"}
    if before["status"] == "done" and same and (goes_on or not hour.args.again) and log.exists():
        print(f"{name}: was done on {before['date']}", flush=True)
        return log.read_text(errors="replace")
    if hour.deadline - time.monotonic() < SHORTEST:
        hour.miss(f"{name} (not started: the stage has met its limit)")
        return None
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{now()} {name}: python {' '.join(command)}", flush=True)
    started, length = time.monotonic(), log.stat().st_size if log.exists() else 0
    returned, status = None, "interrupted"
    try:
        with log.open("ab") as file:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            returned, status = wait(process, hour.deadline)
    finally:  # an interruption is on record as well
        spent = round(time.monotonic() - started, 2)
        earlier = before.get("seconds", 0.0) if goes_on and same else 0.0
        record = {"command": command, "status": status, "seconds": round(earlier + spent, 2)}
        hour.commands[name] = record | circumstances(command)
        if status != "done":
            hour.miss(f"{name} ({status})")
    text = log.read_bytes()[length:].decode(errors="replace")
    if status != "done":
        lines = "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])
        print(f"{name} {status} (exit status {returned}, {spent} s); its last lines:\n{lines}", flush=True)
    hour.write()
    return text if status == "done" else None


def circumstances(command: list[str]) -> dict[str, Any]:
    """When and where a command was run; the commands of one figures.json may have been run on several machines."""
    device = "cpu" if "cpu" in command else "auto"
    return {"date": now(), "versions": machine.versions(), "machine": machine.machine(machine.resolve_device(device))}


def wait(process: subprocess.Popen, deadline: float) -> tuple[int, str]:
    """Exit status of a command, which is stopped at the deadline, and what became of it; it never stays behind."""
    try:
        returned = process.wait(max(0.0, deadline - time.monotonic()))
        return returned, "failed" if returned else "done"
    except subprocess.TimeoutExpired:
        return stop(process), "stopped at the limit"
    except BaseException:  # Ctrl-C, which in a terminal the command has got as well, or SIGTERM
        stop(process, patience=2)
        raise


def stop(process: subprocess.Popen, patience: float = 0.0) -> int:
    """End a command as Ctrl-C does, unless it ends by itself, and by force should it not end within half a minute.

    The `patience` is for a command that ends already, which a second signal would disturb.
    """
    try:
        for seconds in (patience, 30):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:
            process.kill()
    return process.wait()


def started_by(processes: int) -> list[str]:
    """The words before a script of ours that is to run in so many processes."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)


def train(hour: Hour, name: str, *words: object, epochs: int | None, processes: int = 1) -> Path | None:
    """Train, or go on training, into a folder of its own; the last numbered checkpoint if it is finished."""
    folder, log = hour.path(name), hour.path("logs", f"{name}.log")
    data = ["--dataset", "folder", "--data_dir", hour.args.data_dir]
    if hour.args.small:
        data = ["--dataset", "synthetic", "--image_size", 8, "--arch", "resnet18", "--width", 4]
        data += ["--batch_size", 500, "--device", "cpu"]
    length = ["--epochs", epochs, "--save_every", epochs] if epochs else []
    resume = ["--resume"] if list(folder.glob("*_last.pth")) else []
    places = ["--checkpoint_dir", folder, "--images_dir", folder]
    command = [*started_by(processes), "run.py", *data, *length, *words, *places, *resume]
    done = call(hour, name, command, goes_on=True) is not None
    epoch_lines = EPOCH_LINE.findall(log.read_text()) if log.exists() else []
    if epoch_lines:
        hour.figures[name] = {
            "finished": done,
            "epochs": int(epoch_lines[-1][0]),
            "test_accuracy": float(epoch_lines[-1][1]),
            "median_epoch_seconds": statistics.median(float(seconds) for *_, seconds in epoch_lines),
        }
    numbered = folder.glob("*_ckpt_epoch*.pth")
    return max(numbered, key=lambda path: path.stat().st_mtime, default=None) if done else None


def sweep(hour: Hour, name: str, checkpoints: list[Path], *words: object, processes: int = 1) -> list[dict[str, str]]:
    """Sweep, or measure what is missing of a sweep; its rows as they stand, whether or not it is complete."""
    data = ["--dataset", "folder", "--data_dir", hour.args.data_dir]
    if hour.args.small:
        data = ["--max_test_images", 200] + ["--device", "cpu"] * ("--device" not in words)
        data += ["--calibration_images", 64] * ("--compare" in words)
    places = ["--images_dir", hour.args.out, "--name", name]
    command = [*started_by(processes), "pruning.py", "--checkpoint", *checkpoints, *data, *words, *places]
    done = call(hour, name, command, goes_on=True)
    stem = "synthetic_" * hour.args.small + f"{name}_pruning"  # pruning.py puts the first word there itself
    table, about = hour.path(f"{stem}.csv"), hour.path(f"{stem}.json")
    if not table.exists() or not about.exists():
        return []
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    header = json.loads(about.read_text())
    hour.figures[name] = {
        "finished": done is not None,
        "rows": len(rows),
        "device": header["machine"]["device"],
        "seconds_of_levels": round(sum(float(row["seconds"]) for row in rows), 2),
        "seconds_of_command": hour.commands.get(name, {}).get("seconds"),
        "dense_accuracy": {key: figures["accuracy"] for key, figures in header["dense"].items()},
        "sentences": [entry["sentence"] for entry in header.get("summary") or []],
    }
    return rows


def benchmark(hour: Hour, name: str, *words: object) -> None:
    """Run one of the benchmarks and keep its figures."""
    file = hour.path(f"{name}.json")
    small = ["--arch", "resnet18", "--width", 8, "--image_size", 8, "--repeats", 1, "--device", "cpu"]
    small *= hour.args.small
    if call(hour, name, [*words, *small, "--json", file]) is not None:
        found = json.loads(file.read_text())
        hour.figures[name] = {key: value for key, value in found.items() if key != "versions"}
