"""The table: one row an operator, in the order of the alphabet.

A row says which axes of the operands and results are the same, which are summed over and which the
operator reads as a whole: as a string in the grammar of `fxslim.notation` where that suffices, as a
function otherwise.  Where an operator's arguments are shape constants, the row says how they follow
from the axes (`fxslim.resize`).  An operator that PyTorch tags as pointwise needs no row.  An
operator without a row is refused: the analysis blocks whatever it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxslim import fused, graph, indexing, pieces, products, resize, together, views
from fxslim.calls import Call, Dims
from fxslim.notation import Pattern
from fxslim.resize import Resize

__all__ = ["RULES", "Row", "row_for"]

Rule = Callable[[Call], list[Dims]]


@dataclass(frozen=True)
class Row:
    """What the table knows of an operator.

    `rule` gives the dims of its results, `resize` its shape constants after narrowing.
    `probability` marks the operators that turn scores into attention weights along a dimension;
    `quotient` those whose first operand is divided by the second; an operator that is a whole
    attention names its query, key and value in `attention`.  `by_position` marks those whose values
    depend on the position, so that narrowing selects from the full result.
    """

    rule: Rule
    resize: Resize | None = None
    probability: bool = False
    quotient: bool = False
    attention: tuple[str, str, str] | None = None
    by_position: bool = False


def _row(rule: str | Rule, resize: Resize | None = None, **marks: Any) -> Row:
    return Row(Pattern.parse(rule) if isinstance(rule, str) else rule, resize, **marks)


_SAME = _row(views.elementwise)
_FIRST = _row(views.like_first)
_VIEW = _row(views.view, resize.result_sizes("size", infer=True))
_CREATE = _row(views.create, resize.result_sizes("size"))
_ENUMERATE = _row(views.create, by_position=True)
_READ_ALL = _row(views.read_everything)
_SPATIAL = {rank: _row(views.spatial(rank)) for rank in (1, 2, 3)}
_READ_DIM = _row(views.reads("dim"))
_REDUCE = _row(views.reduce)
_SOFTMAX = _row(views.reads("dim"), probability=True)
_SPLIT = _row(pieces.split, resize.split_sizes)

RULES: dict[str, Row] = {
    "__and__": _SAME,
    "__or__": _SAME,
    "__xor__": _SAME,
    "_conj": _FIRST,
    "_grouped_mm": _READ_ALL,
    "_is_all_true": _READ_ALL,
    "_log_softmax": _SOFTMAX,
    "_native_batch_norm_legit": _row(products.batch_norm),
    "_native_batch_norm_legit_no_training": _row(products.batch_norm),
    "_reshape_alias": _READ_ALL,
    "_safe_softmax": _SOFTMAX,
    "_softmax": _SOFTMAX,
    "_to_copy": _FIRST,
    "_unsafe_view": _VIEW,
    "_upsample_bicubic2d_aa": _SPATIAL[2],
    "_upsample_bilinear2d_aa": _SPATIAL[2],
    "_upsample_nearest_exact1d": _SPATIAL[1],
    "_upsample_nearest_exact2d": _SPATIAL[2],
    "_upsample_nearest_exact3d": _SPATIAL[3],
    "_weight_norm": _row(views.others_read),
    "adaptive_avg_pool1d": _SPATIAL[1],
    "adaptive_avg_pool2d": _SPATIAL[2],
    "adaptive_avg_pool3d": _SPATIAL[3],
    "adaptive_max_pool1d": _SPATIAL[1],
    "adaptive_max_pool2d": _SPATIAL[2],
    "addbmm": _row("m n, b m k, b k n -> m n"),
    "addmm": _row("m n, m k, k n -> m n"),
    "addmv": _row("m, m k, k -> m"),
    "addr": _row("m n, m, n -> m n"),
    "affine_grid_generator": _READ_ALL,
    "alias": _FIRST,
    "all": _REDUCE,
    "alpha_dropout": _FIRST,
    "amax": _REDUCE,
    "amin": _REDUCE,
    "aminmax": _REDUCE,
    "any": _REDUCE,
    "arange": _ENUMERATE,
    "argmax": _REDUCE,
    "argmin": _REDUCE,
    "argsort": _READ_DIM,
    "as_strided": _READ_ALL,
    "avg_pool1d": _SPATIAL[1],
    "avg_pool2d": _SPATIAL[2],
    "avg_pool3d": _SPATIAL[3],
    "baddbmm": _row("b m n, b m k, b k n -> b m n"),
    "batch_norm": _row(products.batch_norm),
    "bernoulli": _FIRST,
    "bilinear": _row("... i, ... j, n i j, n -> ... n"),
    "bincount": _READ_ALL,
    "bmm": _row("b m k, b k n -> b m n"),
    "broadcast_to": _row(views.expand, resize.result_sizes("size")),
    "bucketize": _row(views.first_against_all),
    "cat": _row(together.concatenate),
    "cdist": _row(products.distances),
    "chunk": _SPLIT,
    "clone": _FIRST,
    "col2im": _row(views.out_of_windows),
    "complex": _SAME,
    "concat": _row(together.concatenate),
    "constant_pad_nd": _row(pieces.pad),
    "contiguous": _FIRST,
    "conv1d": _row(products.convolution, resize.groups("weight", "groups")),
    "conv2d": _row(products.convolution, resize.groups("weight", "groups")),
    "conv3d": _row(products.convolution, resize.groups("weight", "groups")),
    "conv_transpose1d": _row(products.transposed_convolution, resize.groups("weight", "groups")),
    "conv_transpose2d": _row(products.transposed_convolution, resize.groups("weight", "groups")),
    "conv_transpose3d": _row(products.transposed_convolution, resize.groups("weight", "groups")),
    "copy": _row(products.written_over),
    "copy_": _row(products.written_over),
    "count_nonzero": _REDUCE,
    "cross": _READ_DIM,
    "cummax": _READ_DIM,
    "cummin": _READ_DIM,
    "cumprod": _READ_DIM,
    "cumsum": _READ_DIM,
    "detach": _FIRST,
    "detach_": _FIRST,
    "diag_embed": _READ_ALL,
    "diagonal": _READ_ALL,
    "diff": _READ_ALL,
    "div": _row(views.elementwise, quotient=True),
    "dot": _row("k, k ->"),
    "dropout": _FIRST,
    "einsum": _row(products.einsum),
    "embedding": _row("v! d, ... -> ... d"),
    "empty": _CREATE,
    "empty_like": _FIRST,
    "expand": _row(views.expand, resize.result_sizes("size")),
    "expand_as": _SAME,
    "exponential": _FIRST,
    "eye": _ENUMERATE,
    "fft_fft": _READ_ALL,
    "fft_fft2": _READ_ALL,
    "fft_fftn": _READ_ALL,
    "fft_irfft": _READ_ALL,
    "fft_rfft": _READ_ALL,
    "fft_rfft2": _READ_ALL,
    "fill": _FIRST,
    "flatten": _row(views.view),
    "flex_attention": _row(fused.flex_attention, attention=("query", "key", "value")),
    "flip": _row(views.reads("dims")),
    "floor_divide": _SAME,
    "full": _CREATE,
    "full_like": _FIRST,
    "gather": _row(indexing.gather),
    "glu": _row(pieces.halve),
    "grid_sampler": _row(products.grid_sampler),
    "grid_sampler_2d": _row(products.grid_sampler),
    "group_norm": _row(products.group_norm, resize.groups("input", "num_groups")),
    "gru": _READ_ALL,
    "hann_window": _ENUMERATE,
    "hardswish": _FIRST,
    "histc": _READ_ALL,
    "im2col": _row(views.into_windows),
    "index": _row(indexing.index, resize.constant_index),
    "index_add": _READ_ALL,
    "index_copy": _row(indexing.index_copy),
    "index_put": _row(indexing.index_put),
    "index_select": _row(indexing.index_select, resize.constant_index),
    "instance_norm": _row(products.instance_norm),
    "isin": _row(views.first_against_all),
    "kthvalue": _REDUCE,
    "layer_norm": _row(products.normalised),
    "ldexp": _SAME,
    "leaky_relu": _FIRST,
    "lift_fresh_copy": _FIRST,
    "linalg_vector_norm": _REDUCE,
    "linear": _row("... k, n k, n -> ... n"),
    "linspace": _ENUMERATE,
    "log_sigmoid": _FIRST,
    "log_softmax": _SOFTMAX,
    "logcumsumexp": _READ_DIM,
    "logspace": _ENUMERATE,
    "logsumexp": _REDUCE,
    "lstm": _READ_ALL,
    "masked_fill": _SAME,
    "masked_scatter": _READ_ALL,
    "masked_select": _READ_ALL,
    "matmul": _row(products.matmul),
    "max": _row(views.extremum),
    "max_pool1d": _SPATIAL[1],
    "max_pool2d": _SPATIAL[2],
    "max_pool2d_with_indices": _SPATIAL[2],
    "max_pool3d": _SPATIAL[3],
    "max_pool3d_with_indices": _SPATIAL[3],
    "mean": _REDUCE,
    "median": _REDUCE,
    "meshgrid": _row(views.meshgrid),
    "min": _row(views.extremum),
    "mm": _row("m k, k n -> m n"),
    "mode": _REDUCE,
    "multinomial": _READ_ALL,
    "multiply": _SAME,
    "mv": _row("m k, k -> m"),
    "nansum": _REDUCE,
    "native_dropout": _FIRST,
    "native_group_norm": _READ_ALL,
    "native_layer_norm": _row(products.normalised),
    "new_empty": _CREATE,
    "new_full": _CREATE,
    "new_ones": _CREATE,
    "new_zeros": _CREATE,
    "nonzero": _READ_ALL,
    "norm": _REDUCE,
    "normal": _READ_ALL,
    "numpy_T": _row(views.reverse),
    "one_hot": _row("... -> ... n"),
    "ones": _CREATE,
    "ones_like": _FIRST,
    "outer": _row("m, n -> m n"),
    "pad": _row(pieces.pad),
    "permute": _row(views.permute),
    "pixel_shuffle": _row(views.out_of_windows),
    "pixel_unshuffle": _row(views.into_windows),
    "polar": _SAME,
    "prelu": _row(products.channelwise),
    "prod": _REDUCE,
    "quantile": _READ_ALL,
    "rand": _ENUMERATE,
    "rand_like": _FIRST,
    "randint": _ENUMERATE,
    "randn": _ENUMERATE,
    "randn_like": _FIRST,
    "randperm": _ENUMERATE,
    "repeat": _row(views.repeat, resize.repeats),
    "repeat_interleave": _row(views.repeat_interleave, resize.times),
    "reshape": _row(views.view, resize.result_sizes("shape", infer=True)),
    "reshape_as": _row(views.view_as),
    "resolve_conj": _FIRST,
    "resolve_neg": _FIRST,
    "rms_norm": _row(products.normalised),
    "rnn_relu": _READ_ALL,
    "rnn_tanh": _READ_ALL,
    "roll": _row(views.reads("dims")),
    "rsub": _SAME,
    "scalar_tensor": _CREATE,
    "scaled_dot_product_attention": _row(fused.attention, attention=("query", "key", "value")),
    "scatter": _row(indexing.scatter),
    "scatter_add": _row(indexing.scatter),
    "scatter_reduce": _row(indexing.scatter),
    "searchsorted": _READ_ALL,
    "select": _row(pieces.select, resize.position),
    "select_scatter": _row(pieces.select_scatter, resize.position),
    "slice": _row(pieces.sliced, resize.bounds),
    "slice_scatter": _row(pieces.slice_scatter, resize.bounds),
    "softmax": _SOFTMAX,
    "sort": _READ_DIM,
    "special_i0": _FIRST,
    "special_logit": _FIRST,
    "split": _SPLIT,
    "split_with_sizes": _SPLIT,
    "squeeze": _row(views.view, resize.unit_dims),
    "stack": _row(together.stack),
    "std": _REDUCE,
    "std_mean": _REDUCE,
    "stft": _READ_ALL,
    "sum": _row(views.sum_over),
    "t": _row(views.transpose),
    "tensor_split": _SPLIT,
    "topk": _READ_DIM,
    "transpose": _row(views.transpose),
    "tril": _row("... m! n! -> ... m n"),
    "tril_indices": _ENUMERATE,
    "triu": _row("... m! n! -> ... m n"),
    "triu_indices": _ENUMERATE,
    "type_as": _FIRST,
    "unbind": _row(pieces.unbind, resize.selections),
    "unflatten": _row(views.view, resize.unflattened),
    "unfold": _row(pieces.unfold),
    "unsafe_chunk": _SPLIT,
    "unsafe_split": _SPLIT,
    "unsafe_split_with_sizes": _SPLIT,
    "unsqueeze": _row(views.view),
    "upsample_bicubic2d": _SPATIAL[2],
    "upsample_bilinear2d": _SPATIAL[2],
    "upsample_linear1d": _SPATIAL[1],
    "upsample_nearest1d": _SPATIAL[1],
    "upsample_nearest2d": _SPATIAL[2],
    "upsample_nearest3d": _SPATIAL[3],
    "upsample_trilinear3d": _SPATIAL[3],
    "var": _REDUCE,
    "var_mean": _REDUCE,
    "vdot": _row("k, k ->"),
    "view": _VIEW,
    "view_as": _row(views.view_as),
    "view_as_complex": _row("... c! -> ..."),
    "view_as_real": _row("... -> ... c"),
    "where": _SAME,
    "zeros": _CREATE,
    "zeros_like": _FIRST,
}


def row_for(node: fx.Node) -> Row | None:
    """The row of the operator that `node` calls; None where there is none."""
    row = RULES.get(graph.operator_name(node))
    if row is None and isinstance(node.target, torch._ops.OpOverload):
        return _SAME if torch.Tag.pointwise in node.target.tags else None
    return row
