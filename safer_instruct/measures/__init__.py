"""Measurements on judged answers and pairs: rates, statistics, comparisons."""
