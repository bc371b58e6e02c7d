"""An accelerator for machines without one: tensors that claim to lie on it, refuse to
be mixed with others, and count what a real one is slow at.

    with PretendDevice() as device:
        module = device.move(nn.Linear(3, 2))
        with device.counted() as counts:
            module(device.put(x)).sum().item()
        counts.launches, counts.syncs  # Counters from the line that asked to how often

A tensor there is a wrapper around its values in main memory. Python sees the name that
the device was given, "cuda:0" by default; torch itself sees "meta", the one device that
every build of torch knows and that holds no data.

What counts:

- a launch is every operation that is no view and no mere allocation;
- a synchronisation is whatever makes the host wait: reading a value, `nonzero` and its
  like, an index by a boolean mask, error codes of a decomposition, and each blocking
  copy from one side to the other, for torch waits for those as well;
- copies are counted by the side that they go to.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
META = torch.device("meta")

FREE = {  # mere allocations, and views that do not call themselves so
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_local_scalar_dense"),
}
WAITING = {  # their results, or their error codes, are read by the host
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"),
    *("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class OnDevice(torch.Tensor):
    """A tensor on the pretended device: values in main memory, and the name claimed."""

    @staticmethod
    def __new__(cls, values, claimed, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=META,
            requires_grad=requires_grad,
        )
        tensor.values_, tensor.claimed = values, claimed
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a pretended device that was left")

    def __repr__(self):
        return f"OnDevice({self.values_}, {self.claimed})"

    def __reduce_ex__(self, protocol):
        return OnDevice, (self.values_, self.claimed)


class Counts:
    """How often the host asked for what, by the line of the package that did."""

    def __init__(self):
        self.launches, self.syncs = Counter(), Counter()
        self.to_device, self.to_host = Counter(), Counter()
        self.pageable = Counter()  # of those to the device, from memory not pinned

    @property
    def n_launches(self):
        return self.launches.total()

    @property
    def n_syncs(self):
        return self.syncs.total()

    def __repr__(self):
        lines = []
        for name, counter in vars(self).items():
            lines.append(f"{counter.total()} {name}")
            lines += [f"  {n:5} {line}" for line, n in counter.most_common(25)]
        return "\n".join(lines)


class PretendDevice:
    """Inside, tensors can be on a device of this name.

    Parameters
    ----------
    name : str
    free : int
        Bytes that `torch.cuda.mem_get_info` says are free.
    reserved, allocated : int
        Bytes that torch's allocator has reserved, and those of them that are in use.
    """

    def __init__(self, name="cuda:0", *, free=2**40, reserved=0, allocated=0):
        self.device = torch.device(name)
        self.free, self.reserved, self.allocated = free, reserved, allocated
        self.counts = [Counts()]
        self.pinned = set()  # places of memory in main memory
        self._exits = None

    def __enter__(self):
        with ExitStack() as stack:
            for name, stand_in in self._cuda().items():
                stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
            stack.enter_context(_Operations(self))
            stack.enter_context(_Names(self))
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._exits.__exit__(*error)

    def put(self, tensor, name=None):
        """A copy of a tensor on the device, made before anything is counted."""
        claimed = self.device if name is None else torch.device(name)
        return OnDevice(tensor.detach().clone(), claimed)

    def move(self, module):
        """The module with its weights and buffers on the device."""
        for owner in module.modules():
            for name, p in owner._parameters.items():
                if p is not None:
                    moved = self.put(p)
                    owner._parameters[name] = nn.Parameter(moved, p.requires_grad)
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = self.put(buffer)
        return module

    def adopt(self, net):
        """A fitted skorch net, moved to the device as if it had been fitted there."""
        self.move(net.module_)
        net.device = str(self.device)
        return net

    @contextmanager
    def counted(self):
        """What is asked of the device inside."""
        counts = Counts()
        self.counts.append(counts)
        try:
            yield counts
        finally:
            self.counts.remove(counts)

    def note(self, kind, what):
        line = f"{_line()} {what}"
        for counts in self.counts:
            getattr(counts, kind)[line] += 1

    def is_here(self, device):
        """Whether a device, or the name of one, means this."""
        if device is None or isinstance(device, int):
            return False
        device = torch.device(device)
        return device == META or device.type == self.device.type

    def _cuda(self):
        def left_alone():
            raise AssertionError("the user's cache of free memory is left alone")

        if self.device.type != "cuda":
            return {}
        state = torch.zeros(16, dtype=torch.uint8)
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "device": lambda device: nullcontext(),
            "get_rng_state": lambda device=None: state,
            "set_rng_state": lambda new_state, device=None: None,
            "get_device_properties": lambda device=None: SimpleNamespace(uuid="x"),
            "mem_get_info": lambda device=None: (self.free, 2 * self.free),
            "memory_reserved": lambda device=None: self.reserved,
            "memory_allocated": lambda device=None: self.allocated,
            "empty_cache": left_alone,
            "synchronize": lambda device=None: self.note("syncs", "synchronize"),
        }


def _line():
    """The line of the package, or of a test, that is being run."""
    frame, of_test = sys._getframe(2), None
    while frame is not None:
        path = frame.f_code.co_filename
        if "/fishermask_sk/" in path:
            return f"{path.rsplit('/', 1)[1]}:{frame.f_lineno}"
        if of_test is None and "/tests/test_" in path:
            of_test = f"{path.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return of_test or "elsewhere"


class _Names(TorchFunctionMode):
    """What Python is told: the claimed name, and no values without a copy."""

    def __init__(self, pretended):
        super().__init__()
        self.pretended = pretended

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        if isinstance(first, OnDevice):
            if func == torch.Tensor.device.__get__:
                return first.claimed
            if func == torch.Tensor.is_cuda.__get__:
                return first.claimed.type == "cuda"
            if func in (torch.Tensor.is_cpu.__get__, torch.Tensor.is_meta.__get__):
                return False
            if func is torch.Tensor.tolist:
                self.pretended.note("to_host", "tolist")
                self.pretended.note("syncs", "tolist")
                return first.values_.tolist()
            if name in ("numpy", "__array__"):
                raise TypeError(
                    f"can't convert {first.claimed} device type tensor to numpy. Use "
                    "Tensor.cpu() to copy the tensor to host memory first."
                )
        if name in ("tensor", "as_tensor", "asarray", "new_tensor"):
            return self._made(func, name, args, kwargs)
        if name == "cuda":
            return args[0].to(META)
        if name == "pin_memory":
            found = first.clone()
            self.pretended.pinned.add(_place(found))
            return found
        if name == "is_pinned":
            return not isinstance(first, OnDevice) and _place(first) in (
                self.pretended.pinned
            )
        pinned = kwargs.pop("pin_memory", False)
        out = kwargs.pop("out", None)
        kwargs = {key: self._true(value) for key, value in kwargs.items()}
        found = func(*map(self._true, args), **kwargs)
        if pinned:
            self.pretended.pinned.add(_place(found))
        if out is None:
            return found
        for place, tensor in zip(tree_leaves(out), tree_leaves(found), strict=True):
            _values(place).copy_(_values(tensor))
        return out

    def _made(self, func, name, args, kwargs):
        """A tensor from numbers: made in main memory, and copied."""
        like = args[0] if name == "new_tensor" else None
        data = args[1] if name == "new_tensor" else args[0]
        device = kwargs.get("device", None if like is None else like.device)
        if isinstance(data, torch.Tensor):
            kwargs.pop("device", None)
            kwargs = {key: value for key, value in kwargs.items() if value is not None}
            if device is not None:
                kwargs["device"] = self._true(device)
            return data.to(**kwargs) if kwargs else data
        if any(isinstance(leaf, OnDevice) for leaf in tree_leaves(data)):
            self.pretended.note("syncs", "a tensor from tensors")
            data = tree_map(lambda x: x.item() if isinstance(x, OnDevice) else x, data)
        if device is None:  # a default device, if there is one
            device = torch.get_default_device()
        if not self.pretended.is_here(device) and not isinstance(like, OnDevice):
            return func(*args[: 0 if like is None else 1], data, **kwargs)
        kwargs["device"] = "cpu"
        if like is not None:
            kwargs.setdefault("dtype", like.dtype)
        made = torch.tensor(data, **kwargs)
        return made.to(META).requires_grad_(kwargs.get("requires_grad", False))

    def _true(self, value):
        """The name that torch knows the device by."""
        if isinstance(value, (torch.device, str)) and self._named(value):
            return META
        return value

    def _named(self, value):
        if isinstance(value, str) and not value.startswith(self.pretended.device.type):
            return False
        return self.pretended.is_here(value)


class _Operations(TorchDispatchMode):
    """What the device does: the same on the values, counted."""

    def __init__(self, pretended):
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        ]
        here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        target = kwargs.get("device")
        onto = target is not None and torch.device(target) == META
        if not here and not onto:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        claimed = here[0].claimed if here else self.pretended.device
        for generator in tree_leaves((args, kwargs)):
            if isinstance(generator, torch.Generator) and (onto or target is None):
                raise RuntimeError(
                    f"Expected a '{claimed.type}' device type for generator but found "
                    f"'{generator.device.type}'"
                )
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if name == "copy_":
            return self._copied(func, *args, **kwargs)
        if name == "_to_copy":
            return self._converted(func, args, kwargs, target, onto, claimed)
        self._refuse_a_mixture(func, name, args, tensors, here)
        self._count(func, name, args)
        found = func(*_values(args), **_values(kwargs))
        if torch.Tag.inplace_view in func.tags:  # the wrapper has a shape of its own
            with no_dispatch():
                func(*args, **kwargs)
        if target is not None and not onto:
            return found
        known = {id(tensor.values_): tensor for tensor in here}

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            same = known.get(id(value))
            if same is None:
                return OnDevice(value, claimed)
            if same.shape != value.shape or same.stride() != value.stride():
                raise NotImplementedError(f"{func} changes a tensor's shape in place")
            return same

        return tree_map(wrapped, found)

    def _copied(self, func, to, source, non_blocking=False):
        if isinstance(to, OnDevice) and isinstance(source, OnDevice):
            self.pretended.note("launches", "copy_")
        elif isinstance(to, OnDevice):
            self._moved("to_device", non_blocking, "copy_", source)
        else:
            self._moved("to_host", non_blocking, "copy_")
        func(_values(to), _values(source))
        return to

    def _converted(self, func, args, kwargs, target, onto, claimed):
        (source,) = args
        non_blocking = kwargs.pop("non_blocking", False)
        found = func(_values(source), **kwargs)
        if isinstance(source, OnDevice) and target is not None and not onto:
            self._moved("to_host", non_blocking, "to")
            return found
        if not isinstance(source, OnDevice):
            self._moved("to_device", non_blocking, "to", source)
        else:
            self.pretended.note("launches", "to")
        return OnDevice(found, claimed)

    def _moved(self, kind, non_blocking, what, source=None):
        self.pretended.note(kind, what)
        in_main_memory = source is not None and not isinstance(source, OnDevice)
        if in_main_memory and _place(source) not in self.pretended.pinned:
            self.pretended.note("pageable", what)
        if not non_blocking:
            self.pretended.note("syncs", f"{what}, {kind}")

    def _count(self, func, name, args):
        returned = [r.alias_info for r in func._schema.returns]
        is_view = any(info is not None and not info.is_write for info in returned)
        if name in WAITING:
            self.pretended.note("syncs", name)
        if name in INDEXING:
            for index in filter(torch.is_tensor, tree_leaves(args[1])):
                is_mask = index.dtype in (torch.bool, torch.uint8)
                if is_mask and not (name != "index" and args[2].numel() == 1):
                    self.pretended.note("syncs", f"{name} by a mask")
                if not isinstance(index, OnDevice):
                    self._moved("to_device", False, f"{name} by host's positions")
        is_view = is_view or torch.Tag.inplace_view in func.tags
        if not is_view and name not in FREE:
            self.pretended.note("launches", name)

    def _refuse_a_mixture(self, func, name, args, tensors, here):
        claimed = {tensor.claimed for tensor in here}
        elsewhere = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
        if name in INDEXING and isinstance(args[0], OnDevice):
            elsewhere = [t for t in elsewhere if all(t is not i for i in args[1])]
        if len(claimed) > 1 or (here and elsewhere):
            places = sorted(map(str, claimed)) + ["cpu"] * bool(elsewhere)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least "
                f"two, {places}, in {func}"
            )


def _place(tensor):
    return tensor.untyped_storage().data_ptr()


def _values(tree):
    return tree_map(lambda x: x.values_ if isinstance(x, OnDevice) else x, tree)


@contextmanager
def pretend_nccl():
    """Inside, collectives take the device's tensors and no others, as NCCL does, and
    gloo carries them.
    """

    def on_values(collective):
        def call(*args, **kwargs):
            for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
                if not isinstance(tensor, OnDevice):
                    raise RuntimeError("No backend type associated with device cpu")
                if not tensor.is_contiguous():
                    raise ValueError("Tensors must be contiguous")
            return collective(*_values(args), **_values(kwargs))

        return call

    names = ("all_gather", "all_reduce", "broadcast")
    stand_ins = {name: on_values(getattr(dist, name)) for name in names}
    stand_ins["get_backend_config"] = lambda group=None: "cuda:nccl"
    with mock.patch.multiple(dist, **stand_ins):
        yield
