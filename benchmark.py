#!/usr/bin/env python3
"""Measure throughput, time per part, memory and FLOP/s of SHIKE models beside plain timm models."""
import sys

from shike_timm.cli.benchmark import main

if __name__ == '__main__':
    sys.exit(main())
