"""Do something once a library is imported, without importing it.

A module of a large package often stands half-way in a circle of imports when it is done itself. An action therefore
waits until no module of the package is being imported any more.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

Action = Callable[[], None]


def when_imported(module: str, action: Action) -> None:
    """Call `action` when `module` has been imported: at once where it is, else with the import that brings it.

    Args:
        module: full name, e.g. `transformers.models.auto.modeling_auto`.
    """
    if module in sys.modules:
        action()
        return
    package = module.partition(".")[0]
    watch = next((f for f in sys.meta_path if isinstance(f, Watch) and f.package == package), None)
    if watch is None:
        watch = Watch(package)
        sys.meta_path.insert(0, watch)
    watch.waiting.append((module, action))


class Watch:
    """A finder that sees the modules of one package come, until nothing waits for them."""

    def __init__(self, package: str):
        self.package = package
        self.waiting: list[tuple[str, Action]] = []
        self.depth = 0  # modules of the package that are being imported, and actions under way

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that tells when it is done; None for modules of other packages."""
        if path is None or not name.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = WatchedLoader(spec.loader.name, spec.loader.path, self)
        return spec

    def settle(self) -> None:
        """Act on what has come, if no module of the package is half-way, nor an action that imports some."""
        while not self.depth and (due := [entry for entry in self.waiting if entry[0] in sys.modules]):
            self.waiting.remove(due[0])
            self.depth += 1
            try:
                due[0][1]()
            finally:
                self.depth -= 1
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class WatchedLoader(SourceFileLoader):
    """Loads a source file as ever, and tells its watch."""

    def __init__(self, fullname: str, path: str, watch: Watch):
        super().__init__(fullname, path)
        self.watch = watch

    def exec_module(self, module: ModuleType) -> None:
        self.watch.depth += 1
        try:
            super().exec_module(module)
        finally:
            self.watch.depth -= 1
        self.watch.settle()
