"""Reports: one HTML file that opens anywhere, offline, on a phone and on paper.

This room may import ``kolmo.errors``, ``kolmo.files`` and ``kolmo.runs``.
"""

from kolmo.report.blocks import Code, Figure, Measured, Section, Table
from kolmo.report.html import write_html
from kolmo.report.run import write_report

__all__ = ["Code", "Figure", "Measured", "Section", "Table", "write_html", "write_report"]
