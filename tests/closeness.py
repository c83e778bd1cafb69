"""Results in float32 compared with a library's, by the rule of refqlora/parity/closeness.py."""

from refqlora.parity.closeness import closeness


def agree_but_for_rounding(what, found, expected, exact):
    """`exact` is ours in float64; each is an array, or a dict of arrays by name."""
    far = closeness(found, expected, exact)
    of_float64 = f"from float64 ours {far.found:.1e}, theirs {far.reference:.1e}"
    print(f"{what:<40} {far.worst:.1e}, all {far.apart:.1e}; {of_float64}")
    assert far.near, what
    assert far.no_farther, what


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
