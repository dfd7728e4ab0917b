"""Tables -> figures -> pages; no model is touched here."""
