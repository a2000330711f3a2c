"""What reports share: drawings, pages, tables."""
