"""FLOPs of what APEX does beside training, counted as `model/flops.py` counts the model's.

Per optimizer step every expanded weight is folded once (unfolding subtracts what was kept) and its
gradient is mapped once, however many microbatches and tokens the step has: the operators act on
weights, not on activations. Per token the norms read every unit's activation once, and before the
first stage some tokens pass through the model for its scores. The additions of fold and unfold, the
operators' own AdamW, and ranking are not counted: n d, n (p + q) and units log(units) numbers.

The paper (appendix, Computational Cost) says that "the total FLOPs are 1.01 times those of models
without the operator", and not what it counts. For its TinyLLaMA run (30,000 batches of 64 sequences
of 4096 tokens, on one GPU) fold and gradient map make 1.00002 here, norms add 0.00004, and the
first assessment's 30 M tokens, where no operator is at work, 0.00127. Were every token's
activations passed through the operators (6 FLOPs a parameter and token), that would make 1.0020.
None of these is 1.01, and nothing in the paper's text says where it comes from.
"""

from apex_composer.ops.monarch import factor_pair


def fold_flops(rows: int, columns: int) -> int:
    """T X = Pm L Pm^T R X: 2 n d (p + q), of one weight and step.

    Args:
        rows: n = p * q, those that the operator maps.
        columns: d.
    """
    return 2 * rows * columns * sum(factor_pair(rows))


def map_flops(rows: int, columns: int) -> int:
    """Z, dL, dZ, dR and T^T G[N] of `reference.product_gradients`: 2 n d (2 p + 3 q).

    Args:
        rows: n = p * q, those that the operator maps.
        columns: d.
    """
    p, q = factor_pair(rows)
    return 2 * rows * columns * (2 * p + 3 * q)


def norm_flops(activations: int) -> int:
    """A square and an addition for each number of a group's activation, of one token.

    Args:
        activations: units * unit size.
    """
    return 2 * activations
