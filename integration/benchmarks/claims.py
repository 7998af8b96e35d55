"""What is claimed of the methods, and what the cells say to it; comparisons are paired by seed.

The same seed means the same questions in the same order.
"""

import dataclasses

from integration.benchmarks.blocks import Block, spread, table

MERGED, TRAINED = "test/merged", "test"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`ours` has a lower test NLL than `theirs`, each at its own best rate; a side is (method, measure)."""

    text: str
    ours: tuple[str, str]
    theirs: tuple[str, str]


CLAIMS = (
    Claim("Q-BLoRA is better than QLoRA (NF4)", ("qblora_nf4", TRAINED), ("qlora_nf4", TRAINED)),
    Claim("Q-BLoRA is better than LoRA (affine base)", ("qblora_affine", TRAINED), ("lora_affine", TRAINED)),
    Claim("p=2, e=1 is better than LoRA (affine base)", ("affine_p2e1", TRAINED), ("lora_affine", TRAINED)),
    Claim("p=1, e=2 is better than LoRA (affine base)", ("affine_p1e2", TRAINED), ("lora_affine", TRAINED)),
    Claim("e=2 on o and down is better than LoRA", ("affine_e2_writers", TRAINED), ("lora_affine", TRAINED)),
    Claim("e=2 on q, k, v, gate and up is better than LoRA", ("affine_e2_readers", TRAINED), ("lora_affine", TRAINED)),
    Claim("LoftQ's start is better than zero, QLoRA", ("loftq_nf4", TRAINED), ("qlora_nf4", TRAINED)),
    Claim("PiSSA's start is better than zero, QLoRA", ("pissa_nf4", TRAINED), ("qlora_nf4", TRAINED)),
    Claim("starting at the error is better than zero, Q-BLoRA", ("qblora_error_nf4", TRAINED), ("qblora_nf4", TRAINED)),
    Claim("QA-BLoRA (e=2) is better than QA-LoRA", ("qablora_e2", TRAINED), ("qalora", TRAINED)),
    Claim("QA-BLoRA (e=4) is better than QA-LoRA", ("qablora_e4", TRAINED), ("qalora", TRAINED)),
    Claim("QA-BLoRA (e by rank) is better than QA-LoRA", ("qablora", TRAINED), ("qalora", TRAINED)),
    Claim("QA-BLoRA (e by rank) is better than e=2", ("qablora", TRAINED), ("qablora_e2", TRAINED)),
    Claim("QA-BLoRA (e=2) is better than QLoRA", ("qablora_e2", TRAINED), ("qlora_nf4", TRAINED)),
    Claim("QA-BLoRA (e=2) is better than QA-HiRA (e=2)", ("qablora_e2", TRAINED), ("qahira_e2", TRAINED)),
    Claim("QA-HiRA (e=1) is better than QA-LoRA", ("qahira_e1", TRAINED), ("qalora", TRAINED)),
    Claim("merging QA-BLoRA loses nothing", ("qablora_e2", MERGED), ("qablora_e2", TRAINED)),
    Claim("merged QA-BLoRA is better than QLoRA, rtn", ("qablora_e2", MERGED), ("qlora_nf4", "test/rtn")),
    Claim("merged QA-LoRA is better than QLoRA, rtn", ("qalora", MERGED), ("qlora_nf4", "test/rtn")),
    Claim(
        "merged QA-BLoRA is better than LoRA on the affine base, rtn",
        ("qablora_e2", MERGED),
        ("lora_affine", "test/rtn"),
    ),
    Claim(
        "merged QA-BLoRA is better than QLoRA on float, rtn", ("qablora_e2", MERGED), ("qlora_nf4", "test/float+rtn")
    ),
    Claim("merged QA-BLoRA is better than QLoRA, gptq", ("qablora_e2", MERGED), ("qlora_nf4", "test/gptq")),
    Claim("merged QA-BLoRA is better than LoRA on float, rtn", ("qablora_e2", MERGED), ("lora_float", "test/rtn")),
    Claim("merged QA-BLoRA is better than LoRA on float, gptq", ("qablora_e2", MERGED), ("lora_float", "test/gptq")),
)


def claims_table(block: Block) -> str:
    rows = []
    for claim in CLAIMS:
        for ours in (row for row in block.rows() if row[0] == claim.ours[0]):
            theirs = next((r for r in block.rows() if r[0] == claim.theirs[0] and r[1] in ("none", ours[1])), None)
            if theirs is None:
                continue
            sides = [
                {
                    r["settings"]["seed"]: r["measures"][m]["nll"]
                    for r in block.of(s, block.tested_rate(s))
                    if m in r["measures"]
                }
                for s, m in ((ours, claim.ours[1]), (theirs, claim.theirs[1]))
            ]
            differences = [sides[0][seed] - sides[1][seed] for seed in sorted(sides[0].keys() & sides[1].keys())]
            if differences:
                rows.append([claim.text, ours[1], spread(differences), verdict(claim, differences)])
    return table(["claim", "pooling", "difference in test NLL, paired by seed", "verdict"], rows) if rows else ""


def verdict(claim: Claim, differences: list[float]) -> str:
    """Decided by at least three seeds that agree; by nothing less."""
    if claim.ours[0] == claim.theirs[0]:
        return "holds" if max(map(abs, differences)) < 1e-3 else "does not hold"
    if len(differences) < 3 or min(differences) < 0 < max(differences):
        return "undecided"
    return "holds" if max(differences) < 0 else "does not hold: the other is better"
