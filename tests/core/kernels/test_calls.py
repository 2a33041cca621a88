import ctypes
import math
import random
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sample_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpd.core.kernels import KernelError, Kernels, address_of, word_numbers

finite = st.floats(-1e300, 1e300)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, max_size=20))
def test_native_code_equals_the_python_function_to_the_bit(kernels: Kernels, values: list) -> None:
    array = np.array(values, dtype=np.float64)
    results = []
    for fold in (kernels.fold, sample_kernels.fold):
        state, out = np.zeros(2), np.zeros(1)
        assert fold(array, out, len(values), state) == len(values)
        results.append(state.tobytes() + out.tobytes())
    assert results[0] == results[1]


def test_exp_is_pythons_exp_on_20000_values(kernels: Kernels, fast_kernels: Kernels) -> None:
    rng = random.Random(7)
    values = np.array([rng.uniform(-745.0, 709.0) for _ in range(20_000)])
    expected = np.array([math.exp(value) for value in values.tolist()])
    for native in (kernels, fast_kernels):
        out = np.empty_like(values)
        native.exponentials(values, out)
        assert out.tobytes() == expected.tobytes()


def test_multiplication_and_addition_are_not_fused(fast_kernels: Kernels) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=4096), rng.normal(size=4096)
    c = -(a * b)  # unfused this is exactly zero; fused it leaves the product's rounding error
    out = np.empty_like(a)
    fast_kernels.multiply_add(a, b, c, out)
    assert not out.any()
    fast_kernels.multiply_add(a, b, a, out)
    assert out.tobytes() == (a * b + a).tobytes()


def test_sums_are_not_reassociated(fast_kernels: Kernels) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=1000)
    in_order = 0.0
    for value in values.tolist():
        in_order += value
    for lanes in (2, 4, 8):
        assert in_order != values.reshape(-1, lanes).sum(axis=0).sum()
    assert fast_kernels.running_sum(values) == in_order


def test_integers_beyond_2_to_the_53_are_exact(kernels: Kernels) -> None:
    values = np.array([2**53 + 1, -(2**53) - 1, 2**61 + 1], dtype=np.int64)
    out = np.empty_like(values)
    kernels.scaled(values, out)
    assert out.tolist() == [value * 3 + 1 for value in values.tolist()]


def test_a_routine_is_called_with_the_arrays_themselves(kernels: Kernels) -> None:
    values = np.array([1, -(2**40), 2**61], dtype=np.int64)
    out = np.empty_like(values)
    kernels.doubled(values, out)
    assert out.tolist() == [2, -(2**41), 2**62]


def test_nan_payloads_and_signed_zeros_survive(kernels: Kernels) -> None:
    bits = np.array([0x7FF8_0000_DEAD_BEEF, 0xFFF8_0000_0000_0001, 1 << 63], dtype=np.uint64)
    values = bits.view(np.float64)
    out = np.zeros(3)
    kernels.copied(values, out)
    assert out.view(np.uint64).tolist() == bits.tolist()
    assert struct.pack("<d", kernels.item(values, 0)) == bits[:1].tobytes()
    assert math.copysign(1.0, kernels.item(values, 2)) == -1.0


def test_every_type_passes_as_scalar_and_as_array(kernels: Kernels) -> None:
    small = {"b1": True, "u1": 255, "i4": -(2**31), "u4": 2**32 - 1}
    large = {"f4": 0.1, "i8": -(2**63), "u8": 2**64 - 1, "f8": math.pi}
    for spread, values in ((kernels.spread_small, small), (kernels.spread_large, large)):
        arrays = [np.zeros(1, dtype=code) for code in values]
        spread(*values.values(), *arrays)
        expected = [np.array([value], dtype=code) for code, value in values.items()]
        assert [a.tobytes() for a in arrays] == [e.tobytes() for e in expected]


def test_results_have_their_declared_type(kernels: Kernels) -> None:
    assert kernels.inverted(True) is False
    assert kernels.inverted(np.bool(False)) is True
    assert kernels.narrowed(-5) == -5
    assert kernels.echoed(200) == 200
    assert kernels.halved(0.1) == float(np.float32(0.1) / np.float32(2))


def test_empty_arrays_are_welcome(kernels: Kernels) -> None:
    assert kernels.running_sum(np.empty(0)) == 0.0


def test_raw_takes_addresses_and_lengths(kernels: Kernels) -> None:
    values, out, state = np.array([1.0, 2.0]), np.zeros(1), np.zeros(2)
    words = (address_of(values), 2, address_of(out), 1, 2, address_of(state), 2)
    assert kernels.fold.raw(*words) == 2
    assert out[0] == 3.0
    assert kernels.fold.raw(*words) == 2
    assert out[0] == 6.0


def test_word_numbers_say_where_bytes_lie() -> None:
    values = [struct.pack("<qq", 7 * i, -i) for i in range(40)]
    base = ctypes.c_int64.from_address
    found = [base(8 * number).value for number in word_numbers(values).tolist()]
    behind = [base(8 * number + 8).value for number in word_numbers(values).tolist()]
    assert (found, behind) == ([7 * i for i in range(40)], [-i for i in range(40)])


def test_address_of_is_where_the_view_begins() -> None:
    array = np.arange(10.0)
    assert address_of(array[3:]) == array.ctypes.data + 24


def test_an_index_out_of_bounds_raises_with_the_bounds_check_on(kernels: Kernels) -> None:
    with pytest.raises(KernelError, match="kernel 'item' raised IndexError"):
        kernels.item(np.zeros(3), 3)
    assert kernels.item(np.array([1.0, 2.0]), -1) == 2.0


@pytest.mark.parametrize(("value", "name"), [(-1, "AssertionError"), (101, "ValueError")])
def test_what_a_kernel_raises_is_named(kernels: Kernels, value: int, name: str) -> None:
    kernels.guarded(5)
    with pytest.raises(KernelError, match=f"kernel 'guarded' raised {name}") as caught:
        kernels.guarded(value)
    assert caught.value.code == "kernel_failed"


def test_threads_share_a_kernel(kernels: Kernels) -> None:
    def run(seed: int) -> bool:
        values = np.random.default_rng(seed).normal(size=500)
        expected, state, out = np.zeros(2), np.zeros(2), np.zeros(1)
        sample_kernels.fold(values, out, 500, expected)
        for _ in range(50):
            state[:] = 0
            kernels.fold(values, out, 500, state)
            if state.tobytes() != expected.tobytes():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(32)))


def test_the_gil_is_free_while_a_kernel_runs(fast_kernels: Kernels) -> None:
    values = np.full(4_000_000, 0.5)

    def sees_it_half_done() -> bool:
        out = np.zeros_like(values)
        worker = threading.Thread(target=fast_kernels.exponentials, args=(values, out))
        worker.start()
        seen = False
        while not seen and worker.is_alive():
            seen = out[0] != 0.0 and out[-1] == 0.0
        worker.join()
        return seen

    assert any(sees_it_half_done() for _ in range(20))


def test_unknown_kernels_are_named(kernels: Kernels) -> None:
    with pytest.raises(AttributeError, match=r"has no kernel 'fould'; it has fold, expon"):
        kernels.fould  # noqa: B018
    assert "fold" in list(kernels)
    assert kernels["fold"] is kernels.fold


def test_numba_stays_out_of_this_process(kernels: Kernels) -> None:
    assert kernels
    assert not {"numba", "llvmlite"} & sys.modules.keys()
