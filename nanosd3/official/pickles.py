"""A pickle parser that executes nothing: tensor metadata of PyTorch checkpoints.

A pickle is a program for a small stack machine, which may call any function. Here it is only
parsed: dictionaries, lists, text and numbers are built, and a call is recorded as a `Call` and
never executed. So a file can neither run code nor allocate more memory than its own size.
"""

import io
import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

MOST_STEPS = 2_000_000  # of the stack machine; the largest released model takes a tenth
LONGEST_NAME = 200  # characters of a module and a function; a name may be referred to many times

STORAGES = {  # by the name of their class
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
DENSE = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
DICTIONARIES = ("OrderedDict", "defaultdict", "Counter")
MODULES = (
    *("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization"),
    *("collections", "_codecs"),
)
BUILTINS = ("set", "frozenset", "complex", "bytearray", "slice", "dict", "list", "tuple", "int")


class NotData(Exception):
    """A pickle holds something other than data, which the message names."""


class Call(NamedTuple):
    """A call that a pickle asks for, by the name of the function or class."""

    function: str
    arguments: tuple


@dataclass(frozen=True)
class Storage:
    """The numbers that some tensors share."""

    key: str
    dtype: torch.dtype
    nbytes: int  # as the pickle says


@dataclass(frozen=True)
class PickledTensor:
    """A dense tensor in a checkpoint."""

    storage: Storage
    dtype: torch.dtype
    offset: int  # in elements, as `stride`
    shape: tuple[int, ...]
    stride: tuple[int, ...]


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = ("INT", "LONG", "FLOAT", "UNICODE", "STRING", "BYTES", "BYTEARRAY")  # with prefixes
MARK = object()


def follow(source: io.BytesIO, storages: dict[str, Storage] | None = None) -> object:
    """What the pickle at the current position describes; its storages are added to `storages`.

    Raises NotData for objects other than data, and anything at all for a damaged pickle.
    """
    stack: list = []
    memo: dict = {}
    for step, (opcode, value, _) in enumerate(pickletools.genops(source)):
        if step > MOST_STEPS:
            raise ValueError(f"more than {MOST_STEPS:,} objects")
        name = opcode.name
        if name == "STOP":
            return stack.pop()
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name.endswith(("PUT", "MEMOIZE")):
            place = len(memo) if name == "MEMOIZE" else int(value or 0)
            if not 0 <= place <= MOST_STEPS:  # large numbers may all have the same hash
                raise ValueError("an object of an impossible number")
            memo[place] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[value])
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif "GLOBAL" in name:
            stack.append(known_name(value.replace(" ", ".", 1) if value else qualified(stack)))
        elif name == "BINPERSID":
            stack.append(storage_of(stack.pop()))
            if storages is not None:
                storages[stack[-1].key] = stack[-1]
        elif name.removeprefix("SHORT_").removeprefix("BIN").rstrip("1248") in VALUES:
            stack.append(value)
        else:
            combine(name, stack)
    raise ValueError("a pickle without an end")


def combine(name: str, stack: list) -> None:
    """Carry out an opcode that builds something from what is on top of the stack."""
    if name in ("PROTO", "FRAME"):
        return
    if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
        items = above_mark(stack)
        made = items if name == "LIST" else dictionary(pairs(items)) if name == "DICT" else None
        stack.append(tuple(items) if made is None else made)
    elif name in ("APPENDS", "ADDITEMS"):
        items = above_mark(stack)
        stack[-1].extend(items)
    elif name == "APPEND":
        item = stack.pop()
        stack[-1].append(item)
    elif name in ("SETITEMS", "SETITEM"):
        items = above_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        stack[-1].update(dictionary(pairs(items)))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments = stack.pop()
        stack.append(noted(stack.pop(), arguments))
    elif name == "BUILD":  # attributes of an object, such as a state dict's versions
        stack.pop()
    else:
        raise NotData(name)


def above_mark(stack: list) -> list:
    """Pop the last mark and everything above it; return what was above it."""
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def pairs(items: list) -> Iterable[tuple]:
    return zip(items[::2], items[1::2], strict=True)


def dictionary(items: Iterable) -> dict:
    """A dictionary of pairs, whose keys may not be tuples: hashing a nested one may take forever.
    Numbers become text: their hashes can be made to collide, those of text cannot."""
    made = {}
    for key, value in items:
        large = isinstance(key, int) and key.bit_length() > 64  # too long to write out
        if large or not isinstance(key, str | int | float | bytes | None):
            raise NotData(f"a dictionary by {type(key).__name__}")
        made[str(key) if isinstance(key, int | float) else key] = value
    return made


def qualified(stack: list) -> str:
    """The name of a global whose module and name are on the stack."""
    name, module = stack.pop(), stack.pop()
    if not isinstance(module, str) or not isinstance(name, str):  # may take forever to write out
        raise ValueError("a function whose name is no text")
    return f"{module}.{name}"


def known_name(qualified_name: str) -> Call:
    """A global of state dicts, as a call without arguments. Raises NotData for any other."""
    module, _, name = qualified_name.rpartition(".")
    known = module in MODULES or (module in ("builtins", "__builtin__") and name in BUILTINS)
    if not known or len(qualified_name) > LONGEST_NAME:
        raise NotData(qualified_name)
    return Call(name, ())


def storage_of(reference: tuple) -> Storage:
    """The storage of a persistent id: ("storage", class, key, device, number of elements, ...)."""
    if type(reference) is not tuple or len(reference) not in (5, 6):  # a copy of more takes long
        raise ValueError("a storage of unknown kind")
    kind, storage, key, _, count, *part = reference
    if type(count) is not int or not 0 <= count < 2**62:
        raise ValueError("a storage of impossible size")
    dtype = STORAGES.get(storage.function)
    if kind != "storage" or dtype is None or not isinstance(key, str):
        raise NotData(f"a storage of class {storage.function}")
    if part not in ([], [None]):  # as old versions of PyTorch wrote
        raise NotData("a part of a storage")
    return Storage(key, dtype, count * dtype.itemsize)


def noted(function: Call, arguments: tuple) -> object:
    """What a call would return: a tensor's description, a dictionary, else the call itself."""
    if function.function == "_rebuild_from_type_v2":  # with attributes, as a buffer has
        function, _, arguments, _ = arguments
    name = function.function
    if name in DENSE:
        return dense_tensor(name, arguments)
    if name in PARAMETERS:
        return arguments[0]
    if name == "OrderedDict" and arguments:  # as Python 2 writes it
        made = dictionary(arguments[0])
        arguments[0].clear()  # else one list could become any number of dictionaries
        return made
    if name in DICTIONARIES:
        return {}
    if name == "Size" and type(arguments[0]) is tuple:
        return arguments[0]
    return Call(name, arguments)


def dense_tensor(name: str, arguments: tuple) -> PickledTensor | Call:
    """The tensor that a function of DENSE would return; the call itself if the tensor's numbers are
    not those of the storage, but their conjugates or negatives."""
    storage, offset, shape, stride, *rest = arguments[:8]
    # Anything but a tuple would have to be copied each time it is referred to.
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without a storage or a shape")
    dtype: object = storage.dtype
    flags = rest[2:]
    if name == "_rebuild_tensor_v3":  # of a type that has no storage class of its own
        dtype, flags = vars(torch).get(flags[0].function), flags[1:]
    if not isinstance(dtype, torch.dtype):
        raise NotData("a tensor without a type")
    if any(flags):
        return Call(name, arguments)
    return PickledTensor(storage, dtype, offset, shape, stride)
