"""The report of one run: report.json, report.md, report.html with figures, and the table on the terminal."""

from compressft.report.metrics import load_metrics
from compressft.report.terminal import terminal_table
from compressft.report.write import write_report

__all__ = ["load_metrics", "terminal_table", "write_report"]
