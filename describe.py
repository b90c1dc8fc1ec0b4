#!/usr/bin/env python3
"""Tell what a data set holds: classes, counts, sizes, duplicates, unreadable files."""
import sys

from shike_timm.cli.describe import main

if __name__ == '__main__':
    sys.exit(main())
