"""Draw figures from tables and write them into HTML pages; no model is used here."""
