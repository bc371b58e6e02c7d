"""Per-sample gradients of any differentiable module: vmapped where torch.func can, else
one sample at a time.

Slower than the layer rules, and right where they do not apply.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fishermask_sk.gradients.modules import Batch, map_tensors

# Gradient entries held at once.
CHUNK_ENTRIES = 2**26
# What torch.func raises for what it cannot batch.
VMAP_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    NotImplementedError,
    AttributeError,
    IndexError,
)


OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # the same on Windows
    "Cannot allocate memory",  # the C library
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",  # CUBLAS_, CUDNN_, CUSOLVER_, CUSPARSE_
    "CUFFT_ALLOC_FAILED",
)


class GenericGradients:
    """Rows of vector-Jacobian products, sample by sample, for some of a module's
    parameters.

    Parameters
    ----------
    module : Module
    forward : callable batch -> logits of shape (n, c)
    """

    def __init__(self, module: nn.Module, forward: Callable[[Batch], Tensor]) -> None:
        self.module, self.forward = module, forward
        self.parameters = dict(module.named_parameters())
        self._places = _places(module)

    def vmapped(
        self,
        batch: Batch,
        cotangents: Tensor,
        wanted: Mapping[str, Tensor | None],
        chunk_bytes: int | None = None,
    ) -> Iterator[tuple[slice, slice, dict[str, Tensor]]]:
        """Gradients of some samples and rows at a time, by torch.func.

        Parameters
        ----------
        batch : batch of n samples
        cotangents : Tensor of shape (n, rows, c)
        wanted : dict from parameter name to the entries (m,) that are wanted, None for
            all
        chunk_bytes : int, optional
            What the gradients of all entries may take at once.

        Yields
        ------
        part, of_rows : slices of the samples and the rows
        rows : dict from parameter name to Tensor of shape (n_part, n_rows, m)
        """
        n, n_rows = cotangents.shape[:2]
        chunk = CHUNK_ENTRIES
        if chunk_bytes is not None:
            chunk = min(chunk, chunk_bytes // cotangents.itemsize)
        size = max(1, sum(self.parameters[name].numel() for name in wanted))
        rows_step = max(1, min(n_rows, chunk // size))
        step = max(1, chunk // (size * rows_step))
        for start in range(0, n, step):
            part = slice(start, start + step)
            some = samples(batch, part)
            for row in range(0, n_rows, rows_step):
                of_rows = slice(row, row + rows_step)
                yield (
                    part,
                    of_rows,
                    self._vmapped(some, cotangents[part, of_rows], wanted),
                )

    def one_by_one(
        self, batch: Batch, cotangents: Tensor, wanted: Mapping[str, Tensor | None]
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The same by plain autograd, of one sample at a time, all rows."""
        for i in range(len(cotangents)):
            part = slice(i, i + 1)
            yield part, self._one_sample(samples(batch, part), cotangents[i], wanted)

    def culprits(
        self,
        batch: Batch,
        cotangents: Tensor,
        wanted: Mapping[str, Tensor | None],
        error: Exception,
    ) -> dict[str, str]:
        """Which parameters torch.func could not do, with the reason: those that fail by
        themselves on the first samples, or all where none does.
        """
        reason = "torch.func cannot batch it ({}: {})".format(
            type(error).__name__, str(error).split("\n")[0]
        )
        found = [
            name
            for name in wanted
            if len(wanted) > 1 and not self._can(batch, cotangents, [name])
        ]
        return dict.fromkeys(found or wanted, reason)

    def _can(self, batch: Batch, cotangents: Tensor, names: list[str]) -> bool:
        first = torch.zeros(1, dtype=torch.int64, device=cotangents.device)
        try:
            self._vmapped(
                samples(batch, slice(2)), cotangents[:2], dict.fromkeys(names, first)
            )
        except VMAP_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return False
        return True

    def _vmapped(
        self, batch: Batch, cotangents: Tensor, wanted: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        call = _Call(self.module, self.forward)
        parameters = {name: self.parameters[name].detach() for name in wanted}
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        map_tensors(collect, batch)
        axes = [0 if t.ndim else None for t in tensors]

        def rows_of_sample(
            sample: list[Tensor], cotangent: Tensor
        ) -> dict[str, Tensor]:
            given = iter(
                t if axis is None else t[None]
                for t, axis in zip(sample, axes, strict=True)
            )
            alone = map_tensors(lambda _: next(given), batch)

            def logits(values: dict[str, Tensor]) -> Tensor:
                placed = {
                    place: value
                    for name, value in values.items()
                    for place in self._places[name]
                }
                result: Tensor = torch.func.functional_call(
                    call, placed, (alone,), tie_weights=False
                )[0]
                return result

            pull_back = torch.func.vjp(logits, parameters)[1]
            (gradients,) = torch.func.vmap(pull_back)(cotangent)
            return {
                name: _pick(gradients[name].flatten(1), entries)
                for name, entries in wanted.items()
            }

        with (
            # Weights that are not wanted ask for gradients, too: rows would carry
            # their graph.
            torch.no_grad(),
            # The fused kernels of attention know no vmap.
            sdpa_kernel(SDPBackend.MATH),
            _recurrent_by_steps(self.module),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings(
                "ignore",
                "There is a performance drop because we have not yet implemented",
            )
            result: dict[str, Tensor] = torch.func.vmap(rows_of_sample, (axes, 0))(
                tensors, cotangents
            )
        return result

    def _one_sample(
        self, sample: Batch, cotangent: Tensor, wanted: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        parameters = [self.parameters[name] for name in wanted]
        with torch.enable_grad():
            logits = self.forward(sample)
        if not logits.requires_grad:  # this sample's scores depend on none of them
            zeros = {name: torch.zeros_like(self.parameters[name]) for name in wanted}
            return {
                name: _pick(z.flatten(), wanted[name]).expand(1, len(cotangent), -1)
                for name, z in zeros.items()
            }
        rows = []
        for row in cotangent:
            found = torch.autograd.grad(
                logits,
                parameters,
                row[None],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            rows.append(
                [
                    _pick(dense(g).flatten(), wanted[name])
                    for g, name in zip(found, wanted, strict=True)
                ]
            )
        by_name = zip(wanted, zip(*rows, strict=True), strict=True)
        return {name: torch.stack(of_rows)[None] for name, of_rows in by_name}


@contextmanager
def _recurrent_by_steps(module: nn.Module) -> Iterator[None]:
    """Recurrent layers as torch.func can batch them: step by step in operations that it
    knows, from a state that is each sample's own, as these write into it.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
    library: Any = torch.backends.mkldnn
    with ExitStack() as stack:
        if layers:
            stack.callback(setattr, library, "enabled", library.enabled)
            library.enabled = False
        for layer in layers:
            handle = layer.register_forward_pre_hook(_with_state, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _with_state(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The zeros that a recurrent layer begins with, made of its input."""
    assert isinstance(layer, nn.RNNBase)  # for the type checker
    x, *state = (*args, *kwargs.values())
    if any(s is not None for s in state) or not isinstance(x, Tensor) or x.ndim != 3:
        return None
    n = x.shape[0 if layer.batch_first else 1]
    n_states = layer.num_layers * (2 if layer.bidirectional else 1)
    h = x.new_zeros(n_states, n, layer.proj_size or layer.hidden_size)
    if isinstance(layer, nn.LSTM):
        return (x, (h, x.new_zeros(n_states, n, layer.hidden_size))), {}
    return (x, h), {}


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has an error of its own for an accelerator. The CPU
    says so in words, and so do CUDA's libraries, which take memory past torch.
    """
    # torch.OutOfMemoryError, by the name that torch 2.4 has for it.
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def dense(gradient: Tensor) -> Tensor:
    """The gradient with all its zeros: embeddings can be told to leave them out."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def samples(batch: Batch, part: slice | Tensor) -> Batch:
    """Some samples of a batch, a slice or at some positions."""

    def some(t: Tensor) -> Tensor:
        if not t.ndim:
            return t
        return t[part if isinstance(part, slice) else part.to(t.device)]

    return map_tensors(some, batch)


class _Call(nn.Module):
    """`forward` as a module, so that `torch.func.functional_call` can stand parameters
    in.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._run = lambda batch: forward(
            batch
        )  # a module in this place would be a second child

    def forward(self, batch: Batch) -> Tensor:
        return self._run(batch)


def _pick(flat: Tensor, entries: Tensor | None) -> Tensor:
    return flat if entries is None else flat[..., entries]


def _places(module: nn.Module) -> dict[str, list[str]]:
    """Every place in `_Call` that holds a parameter, each once.

    `functional_call` can find tied weights by itself, but where one module hangs in two
    places it swaps the same slot twice and leaves the caller's module with the
    stand-in.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    places: dict[str, list[str]] = {name: [] for name in names.values()}
    for prefix, child in module.named_modules(prefix="module"):
        for name, p in child.named_parameters(recurse=False, remove_duplicate=False):
            places[names[id(p)]].append(f"{prefix}.{name}")
    return places
