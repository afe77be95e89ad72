"""A dict like any other, but that some of its values are made when they are first asked for, and then kept."""

import functools

__all__ = ["LazyDict"]


class _Later:
    def __repr__(self):
        return "<made when asked for>"


LATER = _Later()


class LazyDict(dict):
    """`make(name)`, which a subclass has, makes the values of the names that are given as `later`.

    What asks for all values makes all of them; copies and pickles are plain dicts.
    """

    def __init__(self, *later: str, **known):
        super().__init__(dict.fromkeys(later, LATER) | known)

    def make(self, name: str):
        raise NotImplementedError

    def __getitem__(self, name):
        value = super().__getitem__(name)
        if value is LATER:
            value = self[name] = self.make(name)
        return value

    def __iter__(self):  # with an iterator of its own, dict(lazy) and f(**lazy) ask for each item
        return super().__iter__()

    def get(self, name, default=None):
        return self[name] if name in self else default  # noqa: SIM401  (this is what dict.get does)

    def __repr__(self):  # with one of their own, IPython's printers make nothing either
        return super().__repr__()

    def __reduce__(self):
        return dict, (dict(self),)


def _made_first(name: str):
    method = getattr(dict, name)

    @functools.wraps(method)
    def made_first(self, *given, **named):
        for key in self:
            self[key]  # is made
        return method(self, *given, **named)

    return made_first


NEED_ALL = ("values", "items", "copy", "pop", "popitem", "setdefault", "__or__", "__ror__", "__eq__", "__ne__")
for _name in NEED_ALL:
    setattr(LazyDict, _name, _made_first(_name))
