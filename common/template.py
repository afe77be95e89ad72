"""A checkpoint's chat template, rendered in a process of its own that can be stopped.

Jinja's sandbox keeps a template away from files and from Python, but not from looping or from filling memory. The child
gets ten seconds and, where the system can limit it (Linux), 1 GiB; its text may be `MOST` characters longer than the
conversation. Elsewhere its memory is bounded by the ten seconds alone. Run as a script, this file is the child; it
needs Jinja and none of our modules, so that it starts in a tenth of a second.
"""

import functools
import json
import subprocess
import sys
from contextlib import suppress

__all__ = ["render"]

SECONDS, MEMORY, MOST = 10, 2**30, 20_000


@functools.lru_cache(maxsize=64)
def render(template: str, variables: str) -> str:
    """The text of the template with its `variables`, a record in JSON. Raises ValueError in our words."""
    asked = json.dumps({"template": template, "variables": variables, "path": sys.path}).encode()
    try:
        child = subprocess.run([sys.executable, "-I", __file__], input=asked, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise ValueError(f"the chat template takes longer than {SECONDS} seconds: it was stopped") from exc
    try:
        told = json.loads(child.stdout)
    except ValueError as exc:  # it was killed
        raise ValueError(f"the chat template ended its process with code {child.returncode}") from exc
    if "error" in told:
        raise ValueError(f"the chat template cannot be rendered: {told['error']}")
    return told["text"]


def environment():
    """Jinja as transformers sets it up for chat templates; with what version 5 forbids, in 4 too."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"Jinja2 {jinja2.__version__} can be broken out of: pip install 'jinja2>=3.1.6'")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # marks the answers of a conversation, for training

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("as_it_is"), [], [], body).set_lineno(line)

        def as_it_is(self, caller):
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(self, *args, **values):
            super().__init__()
            for name, value in dict(*args, **values).items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"{name} cannot be set")
            super().__setitem__(name, value)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    extensions = [Generation, jinja2.ext.loopcontrols]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": Namespace}
    made.globals["dict"] = lambda *args, **values: dict(*args, **values)
    return made


def render_here(template: str, variables: str) -> str:
    """What `render` gives, in this process."""
    most, pieces = len(variables) + MOST, []
    for piece in environment().from_string(template).generate(json.loads(variables)):
        pieces.append(piece)
        most -= len(piece)
        if most < 0:
            raise ValueError(f"it makes more than {MOST} characters of its own")
    return "".join(pieces)


def child() -> None:
    with suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS ignores them
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # should the parent be killed
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    try:
        told = {"text": render_here(asked["template"], asked["variables"])}
    except Exception as exc:  # a template can raise anything
        told = {"error": f"{type(exc).__name__}: {exc}"[:300]}
    print(json.dumps(told))


if __name__ == "__main__":
    child()
