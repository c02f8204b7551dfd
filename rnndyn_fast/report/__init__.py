"""Reports: pages that need nothing else, and the demo."""

from rnndyn_fast.report.page import Card, Page, Picture, Plot, Section, table_html

__all__ = ["Card", "Page", "Picture", "Plot", "Section", "table_html"]
