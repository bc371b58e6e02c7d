"""Per-sample gradients of any differentiable module: vmapped where torch.func can, else
one sample at a time.

Slow beside the layer rules, and right where they do not apply.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fishermask_sk.modules import Batch, map_tensors

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

    Attributes
    ----------
    vmap_works : bool
        False once torch.func has failed on this module, or was seen to be wrong.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Batch], Tensor]) -> None:
        self.module, self.forward = module, forward
        self.parameters = dict(module.named_parameters())
        self._places = _places(module)
        self.vmap_works = True

    def rows(
        self, batch: Batch, cotangents: Tensor, wanted: dict[str, Tensor | None]
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Gradients of some samples at a time.

        Parameters
        ----------
        batch : batch of n samples
        cotangents : Tensor of shape (n, rows, c)
        wanted : dict from parameter name to the entries (m,) that are wanted, None for
        all

        Yields
        ------
        part : slice of the samples
        rows : dict from parameter name to Tensor of shape (n_part, rows, m)
        """
        if self.vmap_works:
            size = (
                sum(self.parameters[name].numel() for name in wanted)
                * cotangents.shape[1]
            )
            step = max(1, CHUNK_ENTRIES // size)
            for start in range(0, len(cotangents), step):
                part = slice(start, start + step)
                try:
                    rows = self._vmapped(samples(batch, part), cotangents[part], wanted)
                except VMAP_ERRORS as error:
                    if start or is_out_of_memory(error):
                        raise
                    self.vmap_works = False
                    break
                yield part, rows
        if not self.vmap_works:
            for i in range(len(cotangents)):
                part = slice(i, i + 1)
                yield (
                    part,
                    self._one_sample(samples(batch, part), cotangents[i], wanted),
                )

    def _vmapped(
        self, batch: Batch, cotangents: Tensor, wanted: dict[str, Tensor | None]
    ) -> dict[str, Tensor]:
        call = _Call(self.module, self.forward)
        parameters = {name: self.parameters[name].detach() for name in wanted}

        def rows_of_sample(sample: Batch, cotangent: Tensor) -> dict[str, Tensor]:
            alone = map_tensors(lambda t: t[None], sample)

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
            # Weights that are not wanted ask for gradients too; rows would carry their
            # graph.
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels of attention know no vmap
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings(
                "ignore",
                "There is a performance drop because we have not yet implemented",
            )
            result: dict[str, Tensor] = torch.func.vmap(rows_of_sample)(
                batch, cotangents
            )
        return result

    def _one_sample(
        self, sample: Batch, cotangent: Tensor, wanted: dict[str, Tensor | None]
    ) -> dict[str, Tensor]:
        parameters = [self.parameters[name] for name in wanted]
        with torch.enable_grad():
            logits = self.forward(sample)
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
                    _pick(g.flatten(), wanted[name])
                    for g, name in zip(found, wanted, strict=True)
                ]
            )
        by_name = zip(wanted, zip(*rows, strict=True), strict=True)
        return {name: torch.stack(of_rows)[None] for name, of_rows in by_name}


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has an error of its own for an accelerator. The CPU
    says so in words, and so do CUDA's libraries, which take memory past torch.
    """
    # torch.OutOfMemoryError, by the name that torch 2.4 has for it.
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def samples(batch: Batch, part: slice) -> Batch:
    """Some samples of a batch."""
    return map_tensors(lambda t: t[part] if t.ndim else t, batch)


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
