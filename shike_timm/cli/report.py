"""The command `shike report`."""
from functools import partial

from ..options import parse
from ..report.runs import ReportConfig, make_report
from .script import command

CONFIG = ReportConfig
parse_report_args = partial(parse, CONFIG, 'Draw a report of a run, or of saved logits, and compare several.')
main = command(make_report, parse_report_args)
