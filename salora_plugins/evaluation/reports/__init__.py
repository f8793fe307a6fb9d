"""What an evaluation found, as data, tables, plots and a page."""
