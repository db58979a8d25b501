"""Covering pairs: each pair of values stands in some case, in fewer cases than there are combinations."""

from itertools import combinations, product

from support.pairs import covering_pairs

PARAMETERS = {"shape": ["a", "b", "c", "d"], "probe": [1, 2, 3], "dtype": ["float32", "bfloat16"], "side": ["a", "b"]}


def test_every_pair_is_in_a_case_and_most_combinations_are_not():
    names, cases = covering_pairs(**PARAMETERS).args
    assert names == tuple(PARAMETERS)
    found = [dict(zip(names, case.values, strict=True)) for case in cases]
    for one, other in combinations(PARAMETERS, 2):
        pairs = {(case[one], case[other]) for case in found}
        assert pairs == set(product(PARAMETERS[one], PARAMETERS[other]))
    assert len(found) < 20 < 48 == 4 * 3 * 2 * 2
