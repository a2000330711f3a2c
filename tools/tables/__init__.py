"""The tables of the pages, made from result files."""
