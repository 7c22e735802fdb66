"""What the passes of a micro-batch need beside the weights: kept for the backward pass, and for a moment.

Written down from the models' operations (`scmdm/model/dit.py`, `llama.py`), tensor by tensor, for fused attention
(SDPA's flash kernels, flash-attn): probabilities are never kept. The tests count the live bytes of real passes.

Legend: T positions of a rank's micro-batch, D width, V vocabulary, C rows of a head chunk; `a` bytes of an element in
compute, the residual stream and norms are float32.
"""

from __future__ import annotations

from scmdm.plan.workload import Layout, Workload

_FLOAT32 = 4
_NORM_STATISTICS = 16  # bytes per position and block: mean and inverse deviation of two norms


def kept_by_block(workload: Workload, layout: Layout, kind: str | None = None) -> int:
    """Bytes that one block keeps for its backward pass, under `kind` of checkpointing (default: the layout's)."""
    model, a, tokens = workload.model, layout.width, layout.tokens(workload)
    kind = kind or layout.activation_checkpointing
    log_sums = _FLOAT32 * model.heads * tokens  # of attention, one float32 per head and position
    if kind == "full":
        return _FLOAT32 * tokens * model.width
    if model.kind == "llama":
        return _kept_by_llama(workload, layout, kind) + log_sums
    if kind == "selective":
        # Input, and the results of: q, k, v; attention; its output map; both maps of the perceptron.
        return (_FLOAT32 + (6 + model.mlp_ratio) * a) * tokens * model.width + log_sums
    float32 = 4 * _FLOAT32  # both norms' inputs and outputs
    # Inputs of the four maps' products, q, k, v as they are made (v is a view of that) and q, k rotated, what the two
    # gates multiply, and the perceptron's inner layer before and after GELU.
    attention = 5 if layout.context == 1 else 4
    compute = (attention + 5 + 2 * model.mlp_ratio) * a
    dropout = 2 * (1 if layout.fused_dropout else a) if model.dropout else 0
    tables = 2 * workload.length // layout.context * (model.width // model.heads) * a if a < _FLOAT32 else 0
    return (float32 + compute + dropout) * tokens * model.width + log_sums + _NORM_STATISTICS * tokens + tables


def _kept_by_llama(workload: Workload, layout: Layout, kind: str) -> int:
    """`kept_by_block` of a LLaMA-like block, without attention's log-sums and under no or selective checkpointing."""
    model, a, tokens = workload.model, layout.width, layout.tokens(workload)
    width, inner = model.width, model.mlp_width
    if kind == "selective":
        # Input, and the results of: q, k, v; attention; its output map; gate and up; down.
        return (_FLOAT32 * width + (4 * width + 2 * model.kv_width + 2 * inner) * a) * tokens
    # Both norms' inputs, and those over their root mean square; outputs, which autocast copies for each of five maps.
    norms = 4 * _FLOAT32 * width + (5 * a if a < _FLOAT32 else 2 * a) * width
    # Rotated q; rotated k and v for every head of q; the output map's input; gate before and after SiLU, up, product.
    compute = (4 * width + 4 * inner) * a
    dropout = 2 * (1 if layout.fused_dropout else a) * width if model.dropout else 0
    tables = 2 * workload.length // layout.context * model.head_width * a if a < _FLOAT32 else 0
    return (norms + compute + dropout + _NORM_STATISTICS // 2) * tokens + tables


def kept_by_final(workload: Workload, layout: Layout) -> int:
    """Bytes that the final norm keeps, and the head's gradient by its input."""
    positions = layout.tokens(workload) * workload.model.width
    return (2 * _FLOAT32 + head_width(workload, layout)) * positions


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
    """Bytes of a chunk's logits, of which everything else is made in place, when every position is masked; and of
    their copy in the compute dtype. Only the gradient keeps a whole chunk on a CPU, too."""
    rows = min(layout.tokens(workload), workload.model.head_chunk)
    a = head_width(workload, layout)
    return (_FLOAT32 + (a if a < _FLOAT32 else 0)) * rows * workload.vocab_size


def block_forward(workload: Workload, layout: Layout) -> int:
    """Bytes of the tensors of a block's forward pass when nothing is kept: at most, in its perceptron."""
    model, a, tokens = workload.model, layout.width, layout.tokens(workload)
    inner = (3 if model.kind == "llama" else 2) * model.mlp_width  # with a gate there are two factors and their product
    return ((2 * _FLOAT32 + a) * model.width + inner * a) * tokens


def block_backward(workload: Workload, layout: Layout) -> int:
    """Bytes of a block's backward pass beside what it kept: gradients of the residual stream and of the perceptron's
    inner layer and output; and what checkpointing makes again of the block's activations."""
    model, tokens = workload.model, layout.tokens(workload)
    inner = (3 if model.kind == "llama" else 1) * model.mlp_width
    gradients = (_FLOAT32 * model.width + (model.width + inner) * layout.width) * tokens
    return gradients + kept_by_block(workload, layout, "none") - kept_by_block(workload, layout)
