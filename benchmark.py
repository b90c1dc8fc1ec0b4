#!/usr/bin/env python3
"""Measure throughput, time per part, memory and FLOP/s of SHIKE models beside plain timm models."""
import sys

from shike_timm.commands.benchmark import benchmark
from shike_timm.commands.cli import run_script
from shike_timm.options import parse_benchmark_args

if __name__ == '__main__':
    sys.exit(run_script(lambda: benchmark(parse_benchmark_args())))
