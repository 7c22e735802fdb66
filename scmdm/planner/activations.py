"""What the passes of a micro-batch need beside the weights: kept for the backward pass, and for a moment.

Written down from the models' operations (`scmdm/models/dit.py`, `llama.py`), tensor by tensor, for fused attention
(SDPA's flash kernels, flash-attn): probabilities are never kept. The tests count the live bytes of real passes.

Legend: T positions of a rank's micro-batch, D width, V vocabulary, C rows of a head chunk; `a` bytes of an element in
compute, the residual stream and norms are float32.
"""

from __future__ import annotations

from scmdm.planner.workload import Layout, Workload

_FLOAT32 = 4
_INDEX = 8  # bytes of a masked position's place
_NORM_STATISTICS = 16  # bytes per position and block: mean and inverse deviation of two norms


def kept_by_block(workload: Workload, layout: Layout, kind: str | None = None) -> int:
    """Bytes that one block keeps for its backward pass, under `kind` of checkpointing (default: the layout's)."""
    model, a, tokens = workload.model, layout.width, layout.tokens(workload)
    kind = kind or layout.activation_checkpointing
    log_sums = _FLOAT32 * model.heads * tokens  # of attention, one float32 per head and position
    if kind == "full":
        return _FLOAT32 * tokens * model.width
    if model.kind == "decoder":
        return _kept_by_llama(workload, layout, kind) + log_sums
    if kind == "selective":
        # Input, and the results of: q, k, v; attention; its output map; both maps of the perceptron.
        return (_FLOAT32 + (6 + model.mlp_ratio) * a) * tokens * model.width + log_sums
    shared = _shares_modulation(workload)
    gated = sum(_kept_by_gate(workload, layout, inner) for inner in (model.width, model.mlp_ratio * model.width))
    float32 = (2 if shared else 4) * _FLOAT32  # both norms' inputs, and their outputs where those are modulated
    # Inputs of the four maps' products, q, k, v as they are made (v is a view of that) and q, k rotated, and the
    # perceptron's inner layer before and after GELU.
    attention = 5 if layout.context == 1 else 4
    compute = (attention + 3 + 2 * model.mlp_ratio) * a
    dropout = 2 * (1 if layout.gpu else a) if model.dropout else 0
    tables = 2 * workload.length // layout.context * model.head_dim * a if layout.gpu else 0
    positions = (float32 + compute + dropout) * tokens * model.width + _NORM_STATISTICS * tokens
    return positions + log_sums + tables + gated


def _kept_by_gate(workload: Workload, layout: Layout, inner: int) -> int:
    """Bytes that the gate of a map from `inner` to the width keeps: what it multiplies (`scmdm.models.dit.gated`)."""
    width, a, tokens = workload.model.width, layout.width, layout.tokens(workload)
    if not _shares_modulation(workload) or tokens < inner:
        return a * tokens * width
    # Gated weights stand in for autocast's copy of them; FSDP2 gathers weights in the dtype of compute.
    return a * inner * width if a == _FLOAT32 or layout.engine == "fsdp2" else 0


def _shares_modulation(workload: Workload) -> bool:
    """Whether norms and gates have it in their weights, because all sequences have the same (`scmdm.models.dit`)."""
    model = workload.model
    return model.kind == "dit" and not (model.time_conditioning or model.labels)


def _kept_by_llama(workload: Workload, layout: Layout, kind: str) -> int:
    """`kept_by_block` of a LLaMA-like block, without attention's log-sums and under no or selective checkpointing."""
    model, a, tokens = workload.model, layout.width, layout.tokens(workload)
    width, inner = model.width, model.inner_width
    if kind == "selective":
        # Input, and the results of: q, k, v; attention; its output map; gate and up; down.
        return (_FLOAT32 * width + (4 * width + 2 * model.kv_width + 2 * inner) * a) * tokens
    # Both norms' inputs, and those over their root mean square; outputs, which autocast copies for each of five maps.
    norms = 4 * _FLOAT32 * width + (5 * a if a < _FLOAT32 else 2 * a) * width
    # Rotated q; rotated k and v for every head of q; the output map's input; gate before and after SiLU, up, product.
    compute = (4 * width + 4 * inner) * a
    dropout = 2 * (1 if layout.gpu else a) * width if model.dropout else 0
    tables = 2 * workload.length // layout.context * model.head_dim * a if layout.gpu else 0
    return (norms + compute + dropout + _NORM_STATISTICS // 2) * tokens + tables


def kept_by_final(workload: Workload, layout: Layout) -> int:
    """Bytes that the final norm keeps, the head's gradient by its input and where that belongs, and rotary tables."""
    positions = layout.tokens(workload) * workload.model.width
    modulated = 0 if _shares_modulation(workload) else _FLOAT32  # the norm's output
    tables = workload.length // layout.context * workload.model.head_dim * _FLOAT32
    return (_FLOAT32 + modulated + head_width(workload, layout)) * positions + tables + _INDEX * layout.tokens(workload)


def kept_by_conditioner(workload: Workload, layout: Layout) -> int:
    """Bytes that the conditioner keeps, the estimate among them."""
    if not workload.passes:
        return 0
    a, positions = layout.width, layout.tokens(workload) * workload.model.width
    return {"projection": a, "norm": a + 2 * _FLOAT32, "mlp": 3 * a}[workload.model.conditioner] * positions


def head_width(workload: Workload, layout: Layout) -> int:
    """Bytes of an element of what the head works in."""
    return _FLOAT32 if workload.model.head_precision == "float32" else layout.width


def head_chunk(workload: Workload, layout: Layout) -> int:
    """Bytes of a chunk's logits when every position is masked. A GPU has probabilities beside them, in the compute
    dtype; on a CPU everything else is made in their place, in float32, and only the gradient keeps a whole chunk, of
    which a copy is in the compute dtype."""
    rows = min(layout.tokens(workload), workload.model.head_chunk)
    a = head_width(workload, layout)
    of_each = 2 * a if layout.gpu else _FLOAT32 + (a if a < _FLOAT32 else 0)
    return of_each * rows * workload.vocab_size


def block_forward(workload: Workload, layout: Layout) -> int:
    """Bytes of the tensors of a block's forward pass when nothing is kept: at most, in its perceptron."""
    model, a, tokens = workload.model, layout.width, layout.tokens(workload)
    inner = (3 if model.kind == "decoder" else 2) * model.inner_width  # with a gate there are two factors and their product
    # The norm's output stays beside its copy in the compute dtype where it is modulated.
    norm = _FLOAT32 if _shares_modulation(workload) and a < _FLOAT32 else 2 * _FLOAT32
    return ((norm + a) * model.width + inner * a) * tokens


def block_backward(workload: Workload, layout: Layout) -> int:
    """Bytes of a block's backward pass beside what it kept: gradients of the residual stream and of the perceptron's
    inner layer and output; and what checkpointing makes again of the block's activations."""
    model, tokens = workload.model, layout.tokens(workload)
    inner = (3 if model.kind == "decoder" else 1) * model.inner_width
    gradients = (_FLOAT32 * model.width + (model.width + inner) * layout.width) * tokens
    if _shares_modulation(workload):  # of a gated map, and of its weights
        gradients += 2 * layout.width * model.width**2
    return gradients + kept_by_block(workload, layout, "none") - kept_by_block(workload, layout)
