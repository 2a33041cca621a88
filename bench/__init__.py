"""Benchmarks: ours and its bare limit in turn, in one run; ratios count, not absolute figures."""
