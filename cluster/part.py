"""A module of ours without most of its code: only the statements that an asked name needs are run.

A recipe is checked against settings that stand beside the code that reads them, one file per plug-in, and that code
imports torch for seconds. `Part("cluster.config").load(...)` is the same check in a tenth of the time: of
`kd/methods/scalekd.py`, say, it runs `Config` and the imports, constants and functions that `Config` names, and so on
through all modules of ours. The classes that it hands out are its own: good for looking, not for building a run.
"""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from kd.plugins import plugin_names

OURS = ("data_sharding", "kd", "cluster", "tuning")


class Part(ModuleType):
    """Stands for the module `name`; what defines a name in it runs when that name is first asked for.

    Modules that are imported already are used as they are, and so are other people's.
    """

    def __init__(self, name: str, known: "dict[str, Part] | None" = None) -> None:
        """`known`: the parts that share their classes with this one."""
        super().__init__(name)
        self._known: dict[str, Part] = {} if known is None else known
        self._known[name] = self
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"there is no module {name!r} with a source file", name=name)
        self.__file__ = spec.origin
        source = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
        self._waiting = [single for statement in source.body for single in _singles(statement)]
        self._binds = {name: statement for statement in self._waiting for name in _bound(statement)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_Part__") or name not in self._binds:
            raise AttributeError(f"module {self.__name__!r} has no {name!r}")
        needed = self._needed(name)
        # In the order of the file, which is the one that works; each but once.
        now = [statement for statement in self._waiting if statement in needed]
        self._waiting = [statement for statement in self._waiting if statement not in needed]
        for statement in now:
            self._run(statement)
        return vars(self)[name]

    def beside(self, name: str) -> Any:
        """The module `name`, in part too where it is not imported already; its classes are this one's."""
        return self._part(name)

    def _needed(self, name: str) -> set[ast.stmt]:
        """The statement that binds `name`, and those that it cannot do without."""
        needed: set[ast.stmt] = set()
        names = [name]
        while names:
            statement = self._binds.get(names.pop())
            if statement is not None and statement not in needed:
                needed.add(statement)
                # What it names, not what it gives names to: a setting may be called like a function.
                loads = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
                names += [node.id for node in loads]
        return needed

    def _run(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).partition(".")[0] in OURS:
            (alias,) = statement.names
            vars(self)[alias.asname or alias.name] = self._from(str(statement.module), alias.name)
        else:
            exec(compile(ast.Module([statement], []), str(self.__file__), "exec"), vars(self))

    def _from(self, module: str, name: str) -> Any:
        if (module, name) == ("kd.plugins", "plugins"):
            return lambda package: {found: self._part(f"{package}.{found}") for found in plugin_names(package)}
        found = self._part(module)
        return self._part(f"{module}.{name}") if hasattr(found, "__path__") else getattr(found, name)

    def _part(self, name: str) -> Any:
        spec = find_spec(name)
        if name in sys.modules or (spec is not None and spec.submodule_search_locations):
            return import_module(name)  # a package holds no code of its own
        return self._known.get(name) or Part(name, self._known)


def _singles(statement: ast.stmt) -> list[ast.stmt]:
    """An import of several names as imports of one name each; everything else as it is."""
    if not isinstance(statement, ast.ImportFrom):
        return [statement]
    return [
        ast.copy_location(ast.ImportFrom(statement.module, [alias], statement.level), statement)
        for alias in statement.names
    ]


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement gives a meaning to."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return {statement.name}
    found: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
    return found
