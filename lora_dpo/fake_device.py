"""A device without memory: tensors with shapes, types and strides and no values, and torch's own code running on them.

The fake tensors are torch's. They say that they are on the CPU, which every build of torch has: one without CUDA ends
the process when a fake GPU's tensor asks for a gradient. What a GPU does otherwise stands in `_CudaRules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lora_dpo.ledger import WEIGHTS, Ledger, places_of

Kind = Literal["cpu", "cuda"]
# What torch's allocator rounds to on a GPU.
CUDA_BLOCK_BYTES = 512
Module = TypeVar("Module", bound=nn.Module)


class FakeDevice:
    """The fake tensors of one trace; those of two don't mix.

    Args:
        kind: the device whose rules hold; the tensors' own `device` is the CPU always.

    Attributes:
        ledger: of what is alive here.
    """

    device = torch.device("cpu")

    def __init__(self, kind: Kind = "cpu") -> None:
        self.kind: Kind = kind
        self.ledger = Ledger(block=CUDA_BLOCK_BYTES if kind == "cuda" else 1)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._results = _Results(self._mode, kind)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Scope in which tensors are made on this device. One that is asked for its value says 1, or True."""
        with ExitStack() as stack:
            if self.kind == "cuda":
                stack.enter_context(_cuda_rules())
            for mode in (self._mode, self._results, self.ledger):
                stack.enter_context(mode)
            yield

    @contextmanager
    def building(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Scope in which networks are made, and changed, with "meta" tensors: `hold` them before they are run.

        It is torch's ordinary code that does so: fake tensors can't be exchanged in a module.

        Args:
            dtype: of weights whose type nothing else decides.
        """
        before = torch.get_default_dtype()
        with _disable_current_modes(), torch.device("meta"), _Ones():
            torch.set_default_dtype(dtype or before)
            try:
                yield
            finally:
                torch.set_default_dtype(before)

    def hold(self, module: Module) -> Module:
        """The module itself, with fake tensors, which count as weights, in the places of its "meta" ones."""
        made: dict[int, Any] = {}
        with _disable_current_modes(), self._mode:
            for place, name, tensor in places_of(module):
                if tensor.is_meta:
                    place[name] = made[id(tensor)] = made.get(id(tensor)) if id(tensor) in made else _like(tensor)
        self.ledger.count(WEIGHTS, made.values())
        return module


def _like(tensor: Tensor) -> Any:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FakeDevice.device)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _Ones(TorchDispatchMode):
    """A "meta" tensor that is asked for its value says 1, or True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _VALUE and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Results(TorchDispatchMode):
    """Remembers what torch's mode works out: the metadata of results, by operation and metadata of arguments.

    A large network has thousands of equal layers, and working them out anew takes minutes.
    """

    def __init__(self, mode: FakeTensorMode, kind: Kind) -> None:
        super().__init__()
        self._mode, self._kind = mode, kind

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        if func is _VALUE:
            return 1.0 if args[0].is_floating_point() else 1
        kwargs = kwargs or {}
        if func in _UNSTEADY:
            return func(*args, **kwargs)
        try:
            kind = self._kind if func in _STATISTICS else None
            key = (kind, func, _metadata(args), _metadata(tuple(kwargs.items())))
        except _Opaque:
            return func(*args, **kwargs)
        again = _KNOWN.get(key)
        if again is not None:
            return again(self, func, args, kwargs)
        if not _steady(func):
            _UNSTEADY.add(func)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        again = _KNOWN[key] = self._again(func, result, args)
        return again(self, func, args, kwargs) if func in _STATISTICS else result

    def _again(self, func: Any, result: Any, args: Any) -> _Again:
        """How to make such a result once more."""
        if args and result is args[0]:
            return _argument
        several = isinstance(result, tuple)
        results = result if several else (result,)
        if not all(one is None or isinstance(one, FakeTensor) for one in results):
            return _anew
        own = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        if any(one is not None and one.untyped_storage()._cdata in own for one in results):
            return _anew if several else _Results._view
        made = [None if one is None else _metadata(one) for one in results]
        if func in _STATISTICS:
            dtype = self._statistics(func, args)
            made[1:] = [one and (*one[:2], dtype, one[3]) for one in made[1:]]
        if several:
            return lambda self, func, args, kwargs: tuple([self._new(one) for one in made])
        return lambda self, func, args, kwargs: self._new(made[0])

    def _statistics(self, func: Any, args: Any) -> torch.dtype:
        """Of the mean and the deviation that a normalisation returns; fake ones have the input's type always."""
        weight = args[_STATISTICS[func]]
        if self._kind == "cuda" and func is _LAYER_NORM:
            return torch.float32
        return args[0].dtype if weight is None else weight.dtype

    def _view(self, func: Any, args: Any, kwargs: Any) -> FakeTensor:
        with in_kernel_invocation_manager(self._mode):
            view = func(*args, **kwargs)
        return FakeTensor(self._mode, view, args[0].fake_device)

    def _new(self, made: Any) -> FakeTensor | None:
        if made is None:
            return None
        shape, stride, dtype, device = made
        with in_kernel_invocation_manager(self._mode):
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(self._mode, meta, device)


_Again = Callable[[_Results, Any, Any, Any], Any]
_KNOWN: dict[Any, _Again] = {}
_UNSTEADY: set[Any] = set()


def _argument(_: _Results, func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]


def _anew(_: _Results, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


_VALUE = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_LAYER_NORM = torch.ops.aten.native_layer_norm.default
# Normalisations, and which argument is their weight.
_STATISTICS = {_LAYER_NORM: 2, torch.ops.aten.native_group_norm.default: 1}


def _steady(func: Any) -> bool:
    """Whether the arguments' metadata decide the result's, and no argument but the first can be changed or returned."""
    unsteady = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    arguments, returns = func._schema.arguments, func._schema.returns
    aliased = {n for n, argument in enumerate(arguments) if argument.alias_info is not None}
    tensors = {str(value.type) for value in returns} == {"Tensor"}
    return tensors and aliased <= {0} and not unsteady.intersection(func.tags)


class _Opaque(Exception):
    """An argument that isn't known by its metadata: a real tensor, a generator."""


def _metadata(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return value.shape, value.stride(), value.dtype, value.fake_device
    if isinstance(value, tuple | list):
        return tuple([_metadata(item) for item in value])
    if value is None or isinstance(value, _PLAIN):
        return type(value), value  # 1 == 1.0 == True
    raise _Opaque


_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@contextmanager
def _cuda_rules() -> Iterator[None]:
    """Scope in which autocast does on the CPU what it does on a GPU: normalisations and resampling are float32.

    They are replaced where modules look them up. A mode would be off in the forward passes that gradient checkpointing
    runs within a backward pass.
    """
    names = [name for name in FLOAT32_ON_CUDA if hasattr(functional, name)]
    before = {name: getattr(functional, name) for name in names}
    try:
        for name in names:
            setattr(functional, name, _in_float32(before[name]))
        yield
    finally:
        for name in names:
            setattr(functional, name, before[name])


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})

    return computed


def _float32(value: Any) -> Any:
    lower = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if lower else value


# Functions of torch.nn.functional by way of which modules come to ATen's list of what autocast computes in float32 on a
# GPU (autocast_mode.h: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE).
FLOAT32_ON_CUDA = (
    "binary_cross_entropy_with_logits", "cosine_embedding_loss", "cosine_similarity", "group_norm",
    "hinge_embedding_loss", "huber_loss", "interpolate", "kl_div", "l1_loss", "layer_norm", "log_softmax",
    "margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_margin_loss", "nll_loss", "pdist",
    "poisson_nll_loss", "rms_norm", "smooth_l1_loss", "soft_margin_loss", "softmax", "softplus", "triplet_margin_loss",
)  # fmt: skip
