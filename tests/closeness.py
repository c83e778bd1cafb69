"""Results in float32 compared with a library's: near them, and no farther from float64 than they are.

How far the two are apart depends on the CPU: on its BLAS, the width of its vectors, its fused multiply-add. How far
each is from float64 says whose rounding it is. A bound that holds on every CPU therefore asks for both.
"""

from refqlora.parity.differences import relative_differences

NEAR, WORST = 1e-5, 1e-4  # of a tensor's largest element: all tensors together, and a single one where terms cancel
FACTOR = 1.5
FLOOR = 2.0**-20  # eight roundings of float32: below it, chance says who is nearer


def agree_but_for_rounding(what, found, expected, exact):
    """`exact` is ours in float64; each is an array, or a dict of arrays by name.

    A distance is the root mean square over the tensors: where terms cancel, a single one is off by chance.
    """
    found, expected, exact = (x if isinstance(x, dict) else {"": x} for x in (found, expected, exact))
    differences = relative_differences(found, expected)
    worst, apart = max(differences.values()), root_mean_square(differences)
    ours, theirs = (root_mean_square(relative_differences(x, exact)) for x in (found, expected))
    print(f"{what:<40} {worst:.1e}, all {apart:.1e}; from float64 ours {ours:.1e}, theirs {theirs:.1e}")
    assert worst < WORST, what
    assert apart < NEAR, what
    assert ours < FACTOR * theirs + FLOOR, what


def root_mean_square(differences):
    return (sum(x * x for x in differences.values()) / len(differences)) ** 0.5


def steps_agree(ours, theirs, exact):
    """The same of training steps (decoders.our_steps, oracles.their_steps): each of their facts over all steps."""
    ours, theirs, exact = (by_fact(steps) for steps in (ours, theirs, exact))
    for what in theirs:
        agree_but_for_rounding(what, ours[what], theirs[what], exact[what])
    return theirs


def by_fact(steps):
    """{fact: {"step NAME": array}} of steps that yield {fact: array or dict of arrays}."""
    facts = {}
    for i, step in enumerate(steps, 1):
        for what, x in step.items():
            named = x if isinstance(x, dict) else {"": x}
            facts.setdefault(what, {}).update({f"{i} {name}": y for name, y in named.items()})
    return facts
