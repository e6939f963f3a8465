"""Reports: one HTML file that opens anywhere, offline, on a phone and on paper."""

from kolmo.report.blocks import Block, Code, Figure, Measured, Relief, Section, Table
from kolmo.report.html import write_html
from kolmo.report.run import write_report
from kolmo.report.sentences import agrees, compared, held

__all__ = [
    "Block",
    "Code",
    "Figure",
    "Measured",
    "Relief",
    "Section",
    "Table",
    "agrees",
    "compared",
    "held",
    "write_html",
    "write_report",
]
