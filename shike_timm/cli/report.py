"""The command `shike report`."""
from functools import partial

from ..options import parse
from ..report.runs import ReportConfig, make_report
from .script import run_script

CONFIG = ReportConfig

parse_report_args = partial(parse, ReportConfig, 'Draw a report of a run, or of saved logits, and compare several.')


def main() -> int:
    return run_script(lambda: make_report(parse_report_args()))
