"""The report of one run: report.json, report.md, report.html with figures, and the table on the terminal."""

from compressft.run.report.metrics import load_metrics
from compressft.run.report.terminal import terminal_table
from compressft.run.report.write import write_report

__all__ = ["load_metrics", "terminal_table", "write_report"]
