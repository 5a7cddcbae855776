"""A simulated accelerator, the device `sim`, for tests on machines without a GPU.

A tensor on `sim` is in host memory, but behaves like one on a GPU:

- An operation on tensors of both devices fails. As on a GPU, a CPU tensor without axes may be an operand of a
  pointwise operation, and CPU tensors may index a tensor of the device.
- A generator of the CPU cannot draw numbers on the device, and `numpy()` fails.
- Everything for which the host waits until a GPU has finished its work is recorded with the line that caused it:
  reading a value, results whose shape depends on values, and copies between the devices, unless `non_blocking`.
- Random numbers that are drawn on the device are recorded too, since they depend on the device.

`enable()` changes torch for the whole process, so use it in a process of its own. Built on torch's experimental
backends in Python.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
PACKAGE = "gpdit_lightning"
# The host reads a value, or needs one to know the shape of the result.
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::allclose", "aten::_linalg_check_errors"}
SHAPED_BY_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::histc",
    "aten::repeat_interleave",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# Under autocast these run in its precision.
AUTOCAST = ("linear", "matmul", "scaled_dot_product_attention", "conv2d", "conv3d")
COPIES = {"aten::_to_copy", "aten::copy_", "aten::copy", "aten::_copy_from", "aten::_copy_from_and_resize"}


@dataclass
class Record:
    """What happened within a block of :func:`recording`.

    Attributes:
        waits: number of times that the host waited, by cause and line, such as "read at stages/base.py:90".
        copies: number of copies between the devices with `non_blocking`, by line; those to the device do not wait if
            the source is pinned.
        random: number of operations that drew random numbers on the device, by name and line.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    random: Counter[str] = field(default_factory=Counter)


_records: list[Record] = []
_libraries: list[torch.library.Library] = []  # an implementation is withdrawn with its library


@contextmanager
def recording() -> Iterator[Record]:
    """Record the waits of a block; blocks may be nested."""
    record = Record()
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def _calling_line() -> str:
    """Return the innermost line of the package, else of any code but torch's and this file's: `folder/file.py:line`."""
    frame, other = sys._getframe(1), "elsewhere"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        where = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        if PACKAGE in path.parts[:-1]:
            return where
        if other == "elsewhere" and "torch" not in path.parts and path != Path(__file__):
            other = where
        frame = frame.f_back
    return other


def _note(kind: str, cause: str) -> None:
    for record in _records:
        getattr(record, kind)[f"{cause} at {_calling_line()}"] += 1


class SimTensor(torch.Tensor):
    """A tensor on `sim`; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "SimTensor":
        """Wrap a CPU tensor."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )
        tensor.inner = inner
        return tensor

    @property
    def data(self) -> torch.Tensor:
        """The same values without their history."""
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, values: "SimTensor") -> None:
        torch.Tensor.data.__set__(self, values)  # shape and dtype
        self.inner = values.inner

    def __repr__(self) -> str:
        _note("waits", "print")
        return f"SimTensor({self.inner!r})"

    def tolist(self) -> Any:
        """Return the values as lists, for which the host waits."""
        _note("waits", "tolist")
        return self.inner.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the values as those of a CPU tensor, which is what a checkpoint is read to."""
        _note("waits", "save")
        return self.inner.detach().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """Fail as for a tensor on a GPU."""
        if force:
            return self.cpu().numpy()
        raise TypeError("can't convert a sim tensor to numpy: copy it to host memory with Tensor.cpu() first.")

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        """Make a tensor from host data, on this device by default."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index_on_device(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index_on_device(index), value)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the values."""
        return _run(func, args, kwargs or {})


def _index_on_device(index: Any) -> Any:
    """Copy a list that is used as an index to the device, as torch does for a GPU."""
    if isinstance(index, tuple):
        return tuple(map(_index_on_device, index))
    return torch.tensor(index, device=NAME) if isinstance(index, list) else index


def _is_sim(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _check_devices(func: Any, args: Sequence[Any], name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise RuntimeError for CPU tensors that a GPU kernel would not accept."""
    cpu = [tensor for tensor in tensors if not isinstance(tensor, SimTensor) and tensor.device.type == "cpu"]
    if name in INDEXING and isinstance(args[0], SimTensor):
        indices = [index for index in args[1] if index is not None]
        for index in indices:
            if not isinstance(index, SimTensor):
                _note("waits", "index on the CPU")
            elif index.dtype in (torch.bool, torch.uint8):
                _note("waits", "mask as index")
        cpu = [tensor for tensor in cpu if tensor.dim() and all(tensor is not index for index in indices)]
    elif torch.Tag.pointwise in func.tags or name.startswith("aten::_foreach"):
        cpu = [tensor for tensor in cpu if tensor.dim()]
    if cpu:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in cpu)
        raise RuntimeError(f"{name}: tensors on {NAME} and, of shape {shapes}, on the CPU, at {_calling_line()}")


def _note_copy(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Record a copy between the devices for which the host waits."""
    if name == "aten::_to_copy":
        source, to_sim = args[0], _is_sim(kwargs.get("device", args[0].device))
        non_blocking = kwargs.get("non_blocking", False)
    elif name in ("aten::copy_", "aten::copy"):
        source, to_sim = args[1], isinstance(args[0], SimTensor)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        source, to_sim = args[0], isinstance(args[1], SimTensor)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    from_sim = isinstance(source, SimTensor)
    if from_sim != to_sim and source.numel():
        _note("copies" if non_blocking else "waits", f"copy to the {'device' if to_sim else 'CPU'}")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation with the values of its tensors, after checking and recording it."""
    name = func._schema.name
    if func._can_decompose():  # without autograd torch passes operations that consist of others as a whole
        return func.decompose(*args, **kwargs)
    if name == "aten::_has_compatible_shallow_copy_type":
        return False
    leaves: list[Any] = []

    def unwrap(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [unwrap(item) for item in value]
        leaves.append(value)
        if isinstance(value, SimTensor):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    plain_args = [unwrap(value) for value in args]
    plain_kwargs = {key: unwrap(value) for key, value in kwargs.items() if key != "pin_memory"}
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sims = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    on_sim = _is_sim(kwargs["device"]) if kwargs.get("device") is not None else bool(sims)
    if name in COPIES:
        _note_copy(name, args, kwargs)
    elif sims:
        _check_devices(func, args, name, tensors)
    if name in READS:
        _note("waits", "read")
    elif name in SHAPED_BY_VALUES:
        _note("waits", f"{name.removeprefix('aten::')}, whose shape depends on values,")
    if on_sim and torch.Tag.nondeterministic_seeded in func.tags:
        _check_random(name, leaves)
    result = func(*plain_args, **plain_kwargs)
    if name in ("aten::copy_", "aten::_copy_from"):
        return args[0] if name == "aten::copy_" else args[1]
    # Operations in place and those with `out` return the tensors that they were given.
    given = {id(sim.inner): sim for sim in sims}
    # In inference mode a view of an ordinary tensor is an ordinary tensor.
    is_view = any(returned.alias_info is not None for returned in func._schema.returns)
    ordinary = is_view and not all(sim.is_inference() for sim in sims)

    def wrap(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(wrap, value)) if type(value) in (list, tuple) else tuple(map(wrap, value))
        if not isinstance(value, torch.Tensor) or not on_sim:
            return value
        if id(value) in given:
            return given[id(value)]
        with torch.inference_mode(False) if ordinary else nullcontext():
            return SimTensor(value)

    return wrap(result)


def _check_random(name: str, leaves: Sequence[Any]) -> None:
    """Record random numbers on the device, and raise RuntimeError for a generator of the CPU."""
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != NAME:
            raise RuntimeError(f"{name}: a generator of {leaf.device} for numbers on {NAME}, at {_calling_line()}")
    _note("random", name)


class _Module:
    """torch.sim, which torch asks about the device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _with_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `torch.tensor` or `torch.as_tensor` with a copy to `device`, which torch cannot make for this device."""

    def run(data: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, *arguments, **options)
        return made if device is None else made.to(device)

    return run


def _in_autocast_dtype(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an operation that first casts its float32 tensors to the precision of autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(NAME)) if is_float else value

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


def enable() -> None:
    """Add the device to torch, once per process, before the package is imported."""
    if _libraries:
        return
    save_file = safetensors.torch.save_file
    # safetensors copies from the devices that it knows.
    safetensors.torch.save_file = lambda tensors, *arguments, **options: save_file(
        {name: tensor.cpu() for name, tensor in tensors.items()}, *arguments, **options
    )
    _setup_privateuseone_for_python_backend(NAME, _Module())
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _with_device(getattr(torch, name)))
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((every, aten))
    every.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")

    def empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        return SimTensor(torch.empty(size, dtype=dtype))

    def empty_strided(
        size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any
    ) -> torch.Tensor:
        return SimTensor(torch.empty_strided(size, stride, dtype=dtype))

    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in AUTOCAST:
        aten.impl(name, _in_autocast_dtype(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
