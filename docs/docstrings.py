"""What mkdocs does to docstrings: Sphinx's roles become links, and examples become blocks of code."""

import re
from pathlib import Path

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*(?:\n\n>>> .*(?:\n.+)*)*", re.M)


_PUBLIC = re.findall(r'^    "(\w+)",$', Path("kdkernels/__init__.py").read_text(), re.M)


def _link(role: re.Match) -> str:
    """A link where the name has a place on the page of the API."""
    name = role[1].removeprefix("kdkernels.")
    if name not in _PUBLIC or name == "GEMMA_SAMPLES":
        return f"`{name}`"
    # The function backends() has the name of the package that it is in.
    return f"[`{name}`][kdkernels.{'backends.' * (name == 'backends')}{name}]"


class Docstrings(griffe.Extension):
    def on_instance(self, *, node, obj, agent, **arguments) -> None:
        if obj.docstring is None:
            return
        text = _EXAMPLE.sub(lambda code: f"```pycon\n{code[0]}\n```", obj.docstring.value)
        obj.docstring.value = _ROLE.sub(lambda role: _link(role), text)
