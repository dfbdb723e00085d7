"""A folder is a registry: every file in it, except `base` and private ones, is a plug-in named after the file."""

import pkgutil
from importlib import import_module
from types import ModuleType


def plugin_names(package: str) -> tuple[str, ...]:
    """The names of the plug-ins of `package`, sorted, without importing them."""
    found = pkgutil.iter_modules(import_module(package).__path__)
    return tuple(sorted(m.name for m in found if m.name != "base" and not m.name.startswith("_")))


def plugin(package: str, name: str) -> ModuleType:
    """Import one plug-in by its name."""
    if name not in plugin_names(package):
        raise ValueError(f"{package} has no plug-in {name!r}; there are: {', '.join(plugin_names(package))}")
    return import_module(f"{package}.{name}")


def plugins(package: str) -> dict[str, ModuleType]:
    """Import every plug-in of `package`, by name."""
    return {name: plugin(package, name) for name in plugin_names(package)}
