"""From LLVM code to functions that Python can call, through llvmlite, which is optional."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from threading import Lock
from typing import Any

#: Calls a function with (first, last, address of the tables); other Python threads run meanwhile.
Compiled = Callable[[int, int, int], None]
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

#: The oldest LLVM whose language is that of the generated code; llvmlite 0.45 has it.
_OLDEST = (20,)

#: What x86 processors have had since 2013. Without these the results were right but slower than torch's.
_NEEDED = ("avx2", "fma", "f16c")
_lock = Lock()


@lru_cache(maxsize=1)
def llvm_is_there() -> bool:
    """Whether there is an llvmlite that compiles for this processor. Imports it only if it is installed."""
    if importlib.util.find_spec("llvmlite") is None:
        return False
    llvm: Any = import_module("llvmlite.binding")
    if llvm.llvm_version_info < _OLDEST:
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    features = llvm.get_host_cpu_features()
    return all(features.get(name) for name in _NEEDED)


class Code:
    """Compiled functions; they live as long as this object.

    Args:
        source: a module in LLVM's language.
        names: of its functions, all `void (i64, i64, ptr)`.
    """

    def __init__(self, source: str, names: Sequence[str]) -> None:
        llvm: Any = import_module("llvmlite.binding")
        with _lock:
            machine = _machine()
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(_object_of(source)))
            self._engine.finalize_object()
            self.functions: dict[str, Compiled] = {
                name: _PROTOTYPE(self._engine.get_function_address(name)) for name in names
            }


def _object_of(source: str) -> bytes:
    """Machine code for this processor."""
    llvm: Any = import_module("llvmlite.binding")
    module = llvm.parse_assembly(source)
    module.verify()
    return bytes(_machine().emit_object(module))


def _machine() -> Any:
    llvm: Any = import_module("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
