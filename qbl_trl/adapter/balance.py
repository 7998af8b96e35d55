"""The mathematics of a balanced adapter, as pure functions.

    y = W x + gain * expand_e(B (A (sum_p(x))))         gain = (alpha / r) * pool_scale(p)

`sum_p` adds p neighbouring inputs, `expand_e` repeats each output e times, neighbours together. The weight change is
constant on blocks of e outputs by p inputs:

    dW[n, k] = delta[n // e, k // p],      delta = gain * B A

What compression saves is spent on rank: R = round(r (K + N) / (K/p + N/e)) has the parameters of a plain LoRA of rank
r. LoRA is p = e = 1, QA-LoRA is p = g, e = 1.

What keeps one learning rate valid when p or e change. Take uncorrelated inputs of variance v, and A started with bound
1 / sqrt(K/p) (Kaiming, fan-in K/p), so that its entries have variance p / (3 K). With c = pool_scale(p):

    Var(pooled input) = c^2 p v,      Var(h) = (K/p) (c^2 p v) (p / 3K) = c^2 p v / 3

so h has plain LoRA's variance for every p exactly if c = 1 / sqrt(p) ("rms"); "mean" shrinks it by p, "sum" grows it by
p. For inputs that are correlated inside a block the sum grows up to p-fold, and the truth lies between "mean" and
"rms". Adam's first step moves every entry of B by the rate, with the sign of its gradient; the loss then falls by the
rate times the sum of |gradient| over B. An entry's gradient is a sum over e outputs (typical size sqrt(e)) times h
(typical size c sqrt(p)), and B has (N/e) R entries, so relative to LoRA of rank r one step at the same rate achieves

    progress = (R / r) e^(-1/2) c sqrt(p)

which for "rms" is (R / r) / sqrt(e): on a square layer 1.41 for p = e = 2, 2.66 for p = 32, e = 2. These are
first-step figures under independence, not a promise; the default follows measurement (integration/benchmarks).

B A has N/e rows and K/p columns, so a rank above min(K/p, N/e) reaches no weight change that this full rank does not:
it only costs parameters. In groups of 32 and with e = 2, a layer of 4096 x 4096 is there from r = 34 on, one of
576 x 576 from r = 5. Beyond that point e = 2 is e = 1 with fewer weight changes to choose from, and before it rank may
no longer be what training lacks: in the tables of integration/benchmarks (full rank 18 on most layers) e = 2 is ahead
of e = 1 with a fifth of full rank, on both tasks, even with two fifths, and on CommonsenseQA behind past full rank.
`default_out_factor` shares outputs up to half.

R is rounded to the nearest whole number. One rank costs 1/R of the adapter, so a single layer of small rank can be off
by 1/(2R); over the layers of a decoder block the total stays within 1% of LoRA's from r = 16 on.

Source: Q-BLoRA and QA-BLoRA, arXiv:2407.17029, section 3; QA-LoRA, arXiv:2309.14717, section 3.3.
"""

import math

from qbl_trl.config import POOLINGS
from qbl_trl.errors import ConfigError


def pool_scale(pooling: str, in_factor: int) -> float:
    """The factor on a sum of p neighbours: "mean" 1/p (as published), "rms" 1/sqrt(p), "sum" 1.

    "rms" keeps the variance of uncorrelated inputs, whatever p is.

    Raises:
        ConfigError: if pooling is none of these.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling={pooling!r} is not known; allowed: {', '.join(POOLINGS)}")
    return {"mean": 1 / in_factor, "rms": 1 / math.sqrt(in_factor), "sum": 1.0}[pooling]


def matched_rank(r: int, in_features: int, out_features: int, in_factor: int, out_factor: int) -> int:
    """R, the rank that spends exactly the parameters of a plain LoRA of rank r (rounded, at least 1)."""
    saved = in_features / in_factor + out_features / out_factor
    return max(1, round(r * (in_features + out_features) / saved))


def largest_useful_r(in_features: int, out_features: int, in_factor: int, out_factor: int) -> float:
    """The nominal rank at which R is the full rank of the block matrix, min(K/p, N/e); more reaches nothing new."""
    inputs, outputs = in_features / in_factor, out_features / out_factor
    return min(inputs, outputs) * (inputs + outputs) / (in_features + out_features)


def default_out_factor(r: int, in_features: int, out_features: int, in_factor: int) -> int:
    """2, as published, or 1 where 2 does not divide the layer or would raise R beyond half of min(K/p, N/2)."""
    fits = out_features % 2 == 0 and out_features > 2
    return 2 if fits and r <= largest_useful_r(in_features, out_features, in_factor, 2) / 2 else 1


def fitting_factors(features: int, multiple_of: int = 1) -> list[int]:
    """Every factor that divides `features` and is a multiple of `multiple_of`, ascending."""
    return [f for f in range(multiple_of, features + 1, multiple_of) if features % f == 0]
