"""A checkpoint's chat template, rendered in a process of its own that can be stopped.

Jinja's sandbox keeps a template away from files and from Python, but cannot stop it from looping or filling memory. The
child process gets ten seconds and, where the system can limit it (Linux), 1 GiB; elsewhere only the time limits its
memory. Its text may be `EXTRA` characters longer than the conversation. Run as a script, this file is the child; it
needs Jinja and none of our modules, so that it starts in a tenth of a second.
"""

import functools
import json
import subprocess
import sys
from contextlib import suppress

__all__ = ["render"]

SECONDS, MEMORY, EXTRA = 10, 2**30, 20_000  # of time, bytes, and characters


@functools.lru_cache(maxsize=64)
def render(template: str, variables: str) -> str:
    """The text of the template with its `variables`, a JSON object as text.

    Raises ValueError if it has an error, takes too long or makes too much of its own.
    """
    request = json.dumps({"template": template, "variables": variables, "path": sys.path}).encode()
    try:
        process = subprocess.run([sys.executable, "-I", __file__], input=request, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise ValueError(f"the chat template takes longer than {SECONDS} seconds: it was stopped") from exc
    try:
        reply = json.loads(process.stdout)
    except ValueError as exc:  # it was killed
        raise ValueError(f"the chat template ended its process with code {process.returncode}") from exc
    if "error" in reply:
        raise ValueError(f"the chat template cannot be rendered: {reply['error']}")
    return reply["text"]


def _environment():
    """Jinja as transformers sets it up for chat templates; what its version 5 forbids is forbidden with 4, too."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    if tuple(int(number) for number in jinja2.__version__.split(".")[:3] if number.isdigit()) < (3, 1, 6):
        raise ImportError(f"Jinja2 {jinja2.__version__} does not contain templates safely: pip install 'jinja2>=3.1.6'")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # marks the answers of a conversation, for training

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("unchanged"), [], [], body).set_lineno(line)

        def unchanged(self, caller):
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
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": Namespace}
    sandbox.globals["dict"] = lambda *args, **values: dict(*args, **values)
    return sandbox


def _render_here(template: str, variables: str) -> str:
    """`render` in this process."""
    room, pieces = len(variables) + EXTRA, []
    for piece in _environment().from_string(template).generate(json.loads(variables)):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            raise ValueError(f"it makes more than {EXTRA} characters of its own")
    return "".join(pieces)


def main() -> None:
    """Read a request from stdin and print the reply."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limits, macOS ignores them
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # in case the parent is killed
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    try:
        reply = {"text": _render_here(request["template"], request["variables"])}
    except Exception as exc:  # a template can raise anything
        reply = {"error": f"{type(exc).__name__}: {exc}"[:300]}
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
