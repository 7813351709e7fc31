"""``rpt report``: runs as one HTML file that opens from disk."""
