"""Networks that a Python file of the user builds, named as `path/to/file.py:function`."""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sparsity.system.errors import UserError, described, one_line


def is_file(arch: str) -> bool:
    """Whether a network is named by a Python file and a function in it."""
    return arch.rpartition(":")[0].endswith(".py")


def build_from_file(arch: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """Run the file that `arch` names and call its function with `arguments`, and `num_classes` where it takes that.

    The file's folder is on `sys.path` meanwhile. Raises UserError, with file and line, for errors of the file, and
    where the arguments do not fit the function or it returns no module.
    """
    path, code = _read(arch)
    name = arch.rpartition(":")[2]
    with _running(arch, path.parent):
        module = _execute(path, code)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(f"--arch {arch}: {path.name} has no function {name}; it has {', '.join(own[:8]) or 'none'}")
    signature = inspect.signature(function)
    takes = signature.parameters.values()
    if any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in takes):
        arguments = {"num_classes": num_classes} | arguments
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"--arch_args: {name} of {path} takes {one_line(signature)[:160]} ({error})") from error
    with _running(arch, path.parent):
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise UserError(f"--arch {arch}: {name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def file_sha256(arch: str) -> str:
    """SHA-256, in hexadecimal, of the file that `arch` names, which is not run; UserError where it cannot be read."""
    return hashlib.sha256(_read(arch)[1]).hexdigest()


def place(error: BaseException, arch: str) -> str:
    """'file, line N: ' of the innermost line that an error came through in the folder of the file of `arch`, or ''."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    folder = Path(arch.rpartition(":")[0]).resolve().parent
    lines = [each for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).parent == folder]
    return f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""


def _read(arch: str) -> tuple[Path, bytes]:
    """The file that `arch` names, and its content."""
    path = Path(arch.rpartition(":")[0])
    try:
        return path.resolve(), path.read_bytes()
    except OSError as error:
        raise UserError(f"--arch {arch}: {path} cannot be read ({error.strerror}); name another file") from error


@cache
def _execute(path: Path, code: bytes) -> ModuleType:
    """The module of a file of this content, which is run once."""
    module = ModuleType(f"user_file_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look up the module of a class
    exec(compile(code, path, "exec"), vars(module))
    return module


@contextmanager
def _running(arch: str, folder: Path) -> Iterator[None]:
    """Put `folder` on `sys.path` and turn exceptions, and an exit, into a UserError with file and line."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--arch {arch}: {place(error, arch)}{described(error)}") from error
    finally:
        with suppress(ValueError):  # the file may have changed the list
            sys.path.remove(str(folder))
