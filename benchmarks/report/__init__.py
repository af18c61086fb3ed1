"""Reports of measured rows: tables, plots, comparisons, pages, targets."""
