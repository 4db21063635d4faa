"""What is measured: rates, statistics, comparisons."""
