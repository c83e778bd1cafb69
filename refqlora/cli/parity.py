"""`refqlora parity`."""
from refqlora.parity.checks import *
def main(a):
    for c in CHECKS: print(run(c,recorded=a), flush=True)
