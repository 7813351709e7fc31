"""`rpt prepare`: from text to a task folder."""
