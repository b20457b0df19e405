"""Modules that are imported from memory, and are to be found only while their own code imports or is called.

So two wheels whose packages have one name do not meet in one process, and neither can stand in for a module of another.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

from caltrain.errors import ConfigError


class MemoryModules(MetaPathFinder, Loader):
    """The wheel's modules by their names: `paths` says which file each is in."""

    def __init__(self, sources: Mapping[str, bytes]) -> None:
        self.paths: dict[str, str] = {}
        # As in Python, a package comes before a module of its name; a path that no import can name is left.
        for path in sorted(sources, key=lambda path: path.endswith("/__init__.py")):
            parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
            if all(part.isidentifier() for part in parts):
                self.paths[".".join(parts)] = path
        self._sources = sources
        self._modules: dict[str, ModuleType] = {}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def check_names(self) -> None:
        """Raise ConfigError `wheel.name-taken` unless all top-level names are the wheel's alone."""
        for name in sorted({name.partition(".")[0] for name in self.paths}):
            known = name in sys.modules or name in sys.stdlib_module_names
            if known or importlib.util.find_spec(name) is not None:
                raise ConfigError(
                    "wheel.name-taken",
                    f"the wheel brings {name!r}, which is importable without it",
                    step="load wheel",
                    fix="Rename the package, or load it where it is not installed: a name must mean one thing.",
                )

    @contextmanager
    def importable(self) -> Iterator[None]:
        """While it lasts, imports find the wheel's modules, each made once. Not for several threads at a time."""
        if self in sys.meta_path:
            yield
            return
        sys.meta_path.insert(0, self)
        sys.modules.update(self._modules)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self._modules = {name: sys.modules.pop(name) for name in self.paths if name in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Part of the import protocol."""
        if fullname not in self.paths:
            return None
        is_package = self.paths[fullname].endswith("/__init__.py")
        return ModuleSpec(fullname, self, origin=f"<wheel>/{self.paths[fullname]}", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Part of the import protocol: run the code, with imports of its own."""
        path = self.paths[module.__name__]
        code: CodeType = compile(self._sources[path], f"<wheel>/{path}", "exec", dont_inherit=True)
        module.__dict__["__builtins__"] = self._builtins
        exec(code, module.__dict__)  # noqa: S102  # this is what an import does

    def _import(self, name: str, *arguments: object, **options: object) -> ModuleType:
        """The `import` of the wheel's code, whenever it runs; a file that cannot be read becomes an ImportError."""
        with self.importable():
            try:
                return builtins.__import__(name, *arguments, **options)  # type: ignore[arg-type]
            except OSError as error:
                raise ImportError(f"{name}: {error.strerror}", name=name) from error
