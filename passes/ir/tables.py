"""How the content of each kind of table is read, and put back into the table itself, which others may hold.

The methods are those of the built-in types: a subclass may do more in its own.
"""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

Put = Callable[[Any, Any], None]  # of the place and its content, whose types belong together
Place = tuple[Put, object, object]
Note = Callable[[Place], None]
Look = Callable[[Any, Note], Iterable[object]]


def look_at_dict(table: dict[object, object], note: Note) -> Iterable[object]:
    """Note the entries of a dict and their order; gives keys and values."""
    content = dict.copy(table)
    note((_put_dict, table, content))
    return _parts(content)


def _put_dict(table: dict[object, object], content: dict[object, object]) -> None:
    if not _same(dict.values(table), content.values()) or not _same(dict.keys(table), content):
        dict.clear(table)
        dict.update(table, _alive(content))


def _ordered(table: OrderedDict[object, object], note: Note) -> Iterable[object]:
    content = _ordered_content(table)
    note((_put_ordered, table, content))
    return _parts(content)


def _ordered_content(table: OrderedDict[object, object]) -> dict[object, object]:
    return {key: dict.__getitem__(table, key) for key in OrderedDict.__iter__(table)}


def _put_ordered(table: OrderedDict[object, object], content: dict[object, object]) -> None:
    now = _ordered_content(table)
    if not _same(now.values(), content.values()) or not _same(now, content):
        OrderedDict.clear(table)
        for key, value in _alive(content).items():
            OrderedDict.__setitem__(table, key, value)


def _parts(content: dict[object, object]) -> Iterable[object]:
    keys = () if all(type(key) is str for key in content) else content
    return (*keys, *content.values())


def _alive(content: dict[object, object]) -> dict[object, object]:
    """Without the entries of weak tables whose objects have gone since."""
    return {key: value for key, value in content.items() if not _is_dead(key) and not _is_dead(value)}


def _is_dead(value: object) -> bool:
    return isinstance(value, weakref.ref) and value() is None


def _same(one: Collection[object], other: Collection[object]) -> bool:
    """Whether two tables hold the same objects in the same order; equal ones are not enough."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _list(table: list[object], note: Note) -> Iterable[object]:
    content = list(list.__iter__(table))
    note((_put_list, table, content))
    return content


def _put_list(table: list[object], content: list[object]) -> None:
    if not _same(list(list.__iter__(table)), content):
        list.__setitem__(table, slice(None), content)


def _deque(table: deque[object], note: Note) -> Iterable[object]:
    content = list(deque.__iter__(table))
    note((_put_deque, table, content))
    return content


def _put_deque(table: deque[object], content: list[object]) -> None:
    if not _same(list(deque.__iter__(table)), content):
        deque.clear(table)
        deque.extend(table, content)


def _set(table: set[object], note: Note) -> Iterable[object]:
    content = list(set.__iter__(table))
    note((_put_set, table, content))
    return content


def _put_set(table: set[object], content: list[object]) -> None:
    if set(map(id, set.__iter__(table))) != set(map(id, content)):
        set.clear(table)
        set.update(table, [value for value in content if not _is_dead(value)])


def _fixed(values: Iterable[object], note: Note) -> Iterable[object]:
    return values


TABLES: dict[type, Look] = {dict: look_at_dict, list: _list, set: _set, deque: _deque, OrderedDict: _ordered}
FIXED: dict[type, Look] = {tuple: _fixed, frozenset: _fixed}


def table_looks(cls: type) -> list[Look]:
    """How a class of tables is looked at; nothing for any other class."""
    kinds = TABLES | FIXED
    found = [base for base in kinds if issubclass(cls, base)]
    return [kinds[base] for base in found if not (base is dict and OrderedDict in found)]
