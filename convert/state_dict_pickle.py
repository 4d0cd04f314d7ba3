"""The pickle inside a PyTorch file, read by a small machine of our own that can only build a state dict.

Python's unpickler cannot be bounded (a few bytes make it allocate gigabytes, nested keys overflow its stack), so
nothing here calls it: the instructions that torch.save writes for a dict of tensors are interpreted one by one, every
other instruction and every global outside `_GLOBALS` is refused by name, and nothing is imported or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from rodimus_mlx.errors import RodimusError


class Storage(NamedTuple):
    """A run of ``count`` numbers of one dtype, kept in the archive's member ``data/<key>``."""

    dtype: str
    key: str
    count: int


class TensorRecord(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: str


class _Call(Enum):
    ORDERED_DICT = "an OrderedDict"
    TENSOR = "a tensor"
    PARAMETER = "a parameter"


# Every global that a state dict may name -> our stand-in.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Call.ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor_v2"): _Call.TENSOR,
    ("torch._utils", "_rebuild_parameter"): _Call.PARAMETER,
    ("torch", "DoubleStorage"): _StorageType("float64"),
    ("torch", "FloatStorage"): _StorageType("float32"),
    ("torch", "HalfStorage"): _StorageType("float16"),
    ("torch", "BFloat16Storage"): _StorageType("bfloat16"),
    ("torch", "LongStorage"): _StorageType("int64"),
    ("torch", "IntStorage"): _StorageType("int32"),
    ("torch", "ShortStorage"): _StorageType("int16"),
    ("torch", "CharStorage"): _StorageType("int8"),
    ("torch", "ByteStorage"): _StorageType("uint8"),
    ("torch", "BoolStorage"): _StorageType("bool"),
}
_MAX_INT = 2**62


class _Refused(Exception):
    """What is wrong with the pickle, without the file's name."""


def read_state_dict(data: bytes, where: str) -> dict[str, TensorRecord]:
    """The tensors that a pickled state dict describes, by name.

    Args:
        data: the pickle.
        where: the file, for messages.

    Raises:
        RodimusError: for anything that is not a plain dict of tensors; nothing has been run.
    """
    try:
        result = _Machine(data).run()
        if type(result) is not dict:
            raise _Refused("holds no dict of tensors; save the model's state_dict()")
        for name, value in result.items():
            if type(value) is not TensorRecord:
                raise _Refused(f"{shown(name)} is {_kind(value)}, not a tensor; save the model's state_dict() alone")
        return result
    except _Refused as error:
        raise RodimusError(f"{where}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RodimusError(f"{where}: the pickle inside is damaged") from error


def shown(text: str) -> str:
    """A name out of a file, made safe for one line of a message."""
    return ascii(text[:100])[1:-1]


def _kind(value: Any) -> str:
    known = {dict: "a table of values", list: "a list", tuple: "a list", str: "a text", int: "a number"}
    return known.get(type(value), "something else")


class _Machine:
    """A stack of values, marks (outer stacks), and a memo; one method per instruction allowed."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            action = _ACTIONS.get(code)
            if action is None:
                raise _Refused(self.unknown(code))
            action(self)

    def unknown(self, code: bytes) -> str:
        if code == b"i":
            return _no_global(self.line(), self.line())
        known = pickletools.code2op.get(code.decode("latin-1"))
        return f"uses the pickle instruction {known.name if known else code.hex()}, which no state dict needs"

    # reading

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise _Refused("the pickle inside is cut short")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, size: int) -> str:
        return self.take(self.number(size)).decode()

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        piece = self.take(end - self.position)
        self.position += 1
        return piece.decode()

    def skip_frame(self) -> None:
        self.number(8)

    def protocol(self) -> None:
        if self.number(1) > 5:
            raise _Refused("uses a pickle protocol newer than 5")

    # stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.outer.pop()
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise _Refused("the pickle inside is damaged")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    # values

    def long(self) -> None:
        self.push(self.number(self.number(1), signed=True))

    def append(self, values: list[Any] | tuple[Any, ...]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused("appends to what is not a list")
        self.stack[-1].extend(values)

    def set_items(self, items: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _Refused("the pickle inside is damaged")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is not str:
                raise _Refused("has a dict whose keys are not names")
            if key in target:
                raise _Refused(f"{shown(key)} is listed twice")
            target[key] = value

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise _Refused("the pickle inside is damaged")
        if (module, name) not in _GLOBALS:
            raise _Refused(_no_global(module, name))
        self.push(_GLOBALS[module, name])

    def storage(self) -> None:
        kind, storage_type, key, _, count = self.stack.pop()
        if kind != "storage" or type(storage_type) is not _StorageType or type(key) is not str:
            raise _Refused("refers to something that is not a storage of this archive")
        self.push(Storage(storage_type.dtype, key, _size(count)))

    def reduce(self) -> None:
        function, arguments = self.last(2)
        if function is _Call.ORDERED_DICT and arguments == ():
            self.push({})
        elif function is _Call.TENSOR:
            storage, offset, shape, strides, *_ = arguments
            if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
                raise _Refused("describes a tensor wrongly")
            if len(shape) != len(strides):
                raise _Refused("describes a tensor whose shape and strides differ in length")
            self.push(TensorRecord(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, strides))))
        elif function is _Call.PARAMETER and type(arguments[0]) is TensorRecord:
            self.push(arguments[0])
        else:
            raise _Refused("calls something that a weight file may not; nothing was run")

    def build(self) -> None:
        target, _ = self.last(2)
        if type(target) is not dict:  # the attribute _metadata of a state dict: versions of modules, of no use here
            raise _Refused("sets attributes on something other than a dict")
        self.push(target)


def _no_global(module: str, name: str) -> str:
    return f"asks for {shown(module)}.{shown(name)}, which a weight file may not; nothing was run"


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise _Refused("has a size, offset or stride that is not a number of elements")
    return value


_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.skip_frame,
    b"(": _Machine.mark,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(m.number(4, signed=True)),
    b"\x8a": _Machine.long,
    b"\x8c": lambda m: m.push(m.text(1)),
    b"X": lambda m: m.push(m.text(4)),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.push(m.last(1)),
    b"\x86": lambda m: m.push(m.last(2)),
    b"\x87": lambda m: m.push(m.last(3)),
    b"a": lambda m: m.append(m.last(1)),
    b"e": lambda m: m.append(m.since_mark()),
    b"s": lambda m: m.set_items(m.last(2)),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"q": lambda m: m.memoize(m.number(1)),
    b"r": lambda m: m.memoize(m.number(4)),
    b"\x94": lambda m: m.memoize(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number(1)]),
    b"j": lambda m: m.push(m.memo[m.number(4)]),
    b"c": lambda m: m.find(m.line(), m.line()),
    b"\x93": lambda m: m.find(*m.last(2)),
    b"Q": _Machine.storage,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
