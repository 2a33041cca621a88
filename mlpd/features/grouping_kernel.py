"""Rows grouped by the code of their entity: a stable counting sort."""

from mlpd.core.kernels import device
from mlpd.features.words import I8


@device
def group_by_code(codes: I8, shift: int, order: I8, starts: I8, groups: int) -> bool:
    """Sort rows by `codes + shift`: group g gets `order[starts[g]:starts[g+1]]`.

    False, with the arrays in disorder, if a code is out of range.
    """
    for group in range(groups + 1):
        starts[group] = 0
    for i in range(len(codes)):
        group = codes[i] + shift
        if not 0 <= group < groups:
            return False
        starts[group + 1] += 1
    for group in range(groups):
        starts[group + 1] += starts[group]
    for i in range(len(codes) - 1, -1, -1):  # backwards, so that ends become starts and ties stay
        group = codes[i] + shift
        starts[group + 1] -= 1
        order[starts[group + 1]] = i
    for group in range(groups):
        starts[group] = starts[group + 1]
    starts[groups] = len(codes)
    return True
