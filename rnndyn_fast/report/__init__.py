"""Reports: pages that need nothing else."""

from rnndyn_fast.report.page import Card, Page, Picture, Plot, Section, table_html

__all__ = ["Card", "Page", "Picture", "Plot", "Section", "table_html"]
