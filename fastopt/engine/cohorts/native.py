"""Compiled functions for the part of a step that runs on the host, where the machine has a C++ compiler.

They are compiled once per machine, by another process while training goes on, and kept on disk. Nothing needs them:
until they are there, and where there is no compiler, Python does the same.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

#: Environment variable: `0` never compiles, `wait` waits for the compiler instead of going on without it.
VARIABLE = "FASTOPT_NATIVE"
_SOURCE = Path(__file__).with_name("look.cpp")
_state: dict[str, Any] = {}
_starting = threading.Lock()


def native() -> Any | None:
    """The module with the functions of look.cpp; None while it is being compiled or if it cannot be."""
    with _starting:
        if "module" not in _state and "failed" not in _state:
            _find_or_compile()
        return _state.get("module")


def compiled_already() -> Any | None:
    """The module if something has asked for it before and it is there."""
    return _state.get("module")


def compiler() -> str | None:
    """The C++ compiler that would be used, None if there is none."""
    return shutil.which(_compiler())


def status() -> tuple[bool, str]:
    """Whether the compiled functions are or will be used here, and a sentence on it. Compiles nothing."""
    if os.environ.get(VARIABLE) == "0":
        return False, f"in Python, as {VARIABLE}=0 says"
    if compiler() is None:
        return False, f"in Python: there is no C++ compiler {_compiler()!r}; CXX names another"
    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        return False, f"in Python: to compile it takes {headers}/Python.h (python3-dev on Debian)"
    library = _library()
    if library is None:
        return False, "in Python: there is no folder of one's own for what is compiled; FASTOPT_CACHE_DIR names one"
    if not library.exists():
        return True, f"will be compiled in the background of a training with many parameters, into {library.parent}"
    return native() is not None, f"compiled, in {library}"


def wait() -> Any | None:
    """As `native`, when the compiler has done its work: what a benchmark starts with."""
    native()
    if "compiler" in _state:
        _state["compiler"].join()
    return native()


def _find_or_compile() -> None:
    wanted = os.environ.get(VARIABLE, "")
    try:
        library = _library()
        if wanted == "0" or library is None:
            _state["failed"] = True
        elif library.exists():
            _state["module"] = _load(library)
        elif "compiler" not in _state:
            _state["compiler"] = threading.Thread(target=_compile, args=(library,), daemon=True)
            _state["compiler"].start()
            if wanted == "wait":
                _state["compiler"].join()
                _find_or_compile()
        elif not _state["compiler"].is_alive():
            _state["failed"] = True
    except (OSError, ImportError):
        _state["failed"] = True


@lru_cache(maxsize=1)
def _library() -> Path | None:
    """Where the compiled module is kept for this Python, torch and source; None without a compiler or a place."""
    if not _SOURCE.exists() or shutil.which(_compiler()) is None:
        return None
    made_of = (_SOURCE.read_text(), torch.__version__, sysconfig.get_config_var("SOABI"), sys.platform, torch.__file__)
    digest = hashlib.sha256("\0".join(map(str, made_of)).encode()).hexdigest()[:20]
    folder = cache_folder()
    return None if folder is None else folder / f"fastopt_look-{digest}.so"


def cache_folder() -> Path | None:
    """The folder of this user for what was compiled: `FASTOPT_CACHE_DIR` or a part of the user's cache; None without.

    A folder that others may write to is not used.
    """
    given = os.environ.get("FASTOPT_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(given) if given else Path(home) / "fastopt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _compile(library: Path) -> None:
    """Compile to a name of its own, then put it in place at once: several processes may do the same."""
    made = library.with_name(f"{library.stem}.{os.getpid()}.tmp")
    abi = int(torch.compiled_with_cxx11_abi())
    root = Path(torch.__file__).parent
    includes = [
        f"-I{root}/include",
        f"-I{root}/include/torch/csrc/api/include",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    libraries = [f"-L{root}/lib", "-ltorch_python", "-ltorch_cpu", "-lc10"]
    command = [_compiler(), "-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    try:
        subprocess.run(
            [*command, *includes, str(_SOURCE), "-o", str(made), *libraries],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=300,
        )
        os.replace(made, library)
    except (OSError, subprocess.SubprocessError):
        made.unlink(missing_ok=True)


def _load(library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("fastopt_look", str(library))
    spec = importlib.util.spec_from_loader("fastopt_look", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
