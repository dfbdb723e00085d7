"""Which output of a teacher answers for which of our classes."""

import difflib
from collections.abc import Mapping, Sequence


def choose(
    classes: Sequence[str], renamed: Mapping[str, str | int], known: Sequence[str] | None, outputs: int, source: str
) -> list[int]:
    """The number of the output of each class, in our order.

    `renamed` says what `source` calls a class, by name or by number of the output; the others keep their names. `known`
    are the names of its `outputs`, None where nobody wrote them down. ValueError with what is missing or met twice, and
    how to say it.
    """
    foreign = sorted(renamed.keys() - set(classes))
    if foreign:
        raise ValueError(f"classes: {', '.join(foreign)} are none of the data set's classes ({', '.join(classes)})")
    called = {name: renamed.get(name, name) for name in classes}
    rows = {name: _row(its, known, outputs) for name, its in called.items()}
    lost = [name for name, row in rows.items() if row is None]
    if lost and known is None:
        raise ValueError(
            f"{source} has {outputs} outputs and no class names in it; say which output is which class: "
            f"classes: {{{', '.join(f'{name}: NUMBER' for name in lost[:3])}}}"
        )
    if lost:
        raise ValueError(
            f"{source} does not know {', '.join(_described(called[name], known or ()) for name in lost)}; say what it "
            f"calls them: classes: {{{', '.join(f'{name}: ITS_NAME' for name in lost[:3])}}}"
        )
    found = [row for row in rows.values() if row is not None]
    twice = [name for name, row in rows.items() if found.count(-1 if row is None else row) > 1]
    if twice:
        raise ValueError(f"classes: {', '.join(twice)} would share one output of {source}; give each its own")
    return found


def _row(called: str | int, known: Sequence[str] | None, outputs: int) -> int | None:
    if isinstance(called, int):
        return called if 0 <= called < outputs else None
    return known.index(called) if known is not None and called in known else None


def _described(called: str | int, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(called), known, n=1)
    return f"{called!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
