"""``rpt report``: show runs in one HTML file that opens from disk."""
