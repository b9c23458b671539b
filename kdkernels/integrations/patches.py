"""Functions of other packages replaced by ours, and put back: what the ``patch()`` of a trainer's drop-in does."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple


class Target(NamedTuple):
    """What is replaced: an attribute of ``module``, or of its class or dict ``owner``. A module's own attribute is
    replaced wherever the package has imported it as well: what is imported later finds ours."""

    module: str
    owner: str | None
    name: str
    ours: Callable[..., Any]

    def get(self) -> Any:
        """What stands there, or None, as where an installed package has no such module."""
        try:
            return self._namespace().get(self.name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if "." in missing and f"{self.module}.".startswith(f"{missing}."):
                return None
            raise  # it is a package that is missing

    def places(self) -> list[dict[str, Any]]:
        """The namespaces that hold it, its own first."""
        own, given, package = self._namespace(), self.get(), self.module.partition(".")[0] + "."
        found = [own]
        for name, module in list(sys.modules.items()) if self.owner is None else ():
            other = vars(module)
            if name.startswith(package) and other is not own and other.get(self.name) is given:
                found.append(other)
        return found

    def put(self, function: Any, place: dict[str, Any]) -> None:
        holder = self._holder()
        if isinstance(holder, type):  # whose namespace is read alone
            setattr(holder, self.name, function)
        else:
            place[self.name] = function

    def _holder(self) -> Any:
        module = importlib.import_module(self.module)
        return module if self.owner is None else getattr(module, self.owner)

    def _namespace(self) -> dict[str, Any]:
        holder = self._holder()
        return holder if isinstance(holder, dict) else vars(holder)

    def __str__(self) -> str:
        return ".".join(part for part in (self.module, self.owner, self.name) if part)


class Patch:
    """What ``patch()`` returns: leaving it as a context manager undoes what that call did."""

    def __init__(self, patches: Patches, owns: bool) -> None:
        self._patches, self._owns = patches, owns

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception) -> None:
        if self._owns:
            self._patches.unpatch()


class Patches:
    """The targets of one package, whose versions from ``tested[0]`` to below ``tested[1]`` the suite is run with.
    ``name`` is that of our module, where the package has another."""

    def __init__(
        self,
        package: str,
        tested: tuple[tuple[int, ...], tuple[int, ...]],
        targets: Sequence[Target],
        name: str | None = None,
    ) -> None:
        self.package, self.tested, self.targets, self.name = package, tested, targets, name or package
        #: What stood in the place of each target, while it is patched, and where.
        self.originals: dict[Target, tuple[Any, list[dict[str, Any]]]] = {}

    def patch(self) -> Patch:
        """RuntimeError, and nothing is replaced, where the version is another, or a function is missing or takes
        other arguments."""
        self._require_tested_version()
        if self.originals:
            return Patch(self, owns=False)
        found = {target: (self._original(target), target.places()) for target in self.targets}
        for target, (_, places) in found.items():
            for place in places:
                target.put(target.ours, place)
        self.originals.update(found)
        return Patch(self, owns=True)

    def unpatch(self) -> None:
        """RuntimeError, and nothing is put back, where somebody replaced ours in turn."""
        for target in self.originals:
            if target.get() is not target.ours:
                raise RuntimeError(f"{target} was replaced again after patch(); undo that before unpatch()")
        for target, (original, _) in self.originals.items():
            for place in target.places() if target.get() is target.ours else ():  # imported since then, too
                target.put(original, place)
        for target, (original, places) in self.originals.items():
            for place in places:
                target.put(original, place)
        self.originals.clear()

    def theirs(self, target: Target) -> Any:
        """What the package has there itself, patched or not."""
        return self.originals[target][0] if target in self.originals else target.get()

    def _require_tested_version(self) -> None:
        first, below = (".".join(map(str, version)) for version in self.tested)
        version = importlib.metadata.version(self.package)
        parts = tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))
        parts += (0,) * len(self.tested[0])  # 1.16 is 1.16.0
        if not self.tested[0] <= parts < self.tested[1]:
            wanted = f"{self.package} >={first},<{below}"
            raise RuntimeError(
                f"kdkernels.integrations.{self.name} is tested with {wanted} and {self.package} {version} is "
                f"installed; pip install '{wanted.replace(' ', '')}', or call its functions yourself"
            )

    def _original(self, target: Target) -> Any:
        """What stands there now, after making sure that it can be replaced."""
        original = target.get()
        if original is None:
            raise RuntimeError(f"{self.package} has no {target}, which patch() would replace")
        theirs, ours = _parameters(original), _parameters(target.ours)
        if theirs != ours:
            raise RuntimeError(f"{target} takes {theirs}, but its replacement takes {ours}")
        return original


def _parameters(function: Any) -> list[str]:
    """The names of a function's, or of a class's ``forward``: a module or an autograd.Function is called by it."""
    function = getattr(function, "forward", function)
    return list(inspect.signature(getattr(function, "__func__", function)).parameters)
