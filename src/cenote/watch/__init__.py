"""Looking at pools from outside: exporters. Sits on top; no pool knows of it."""
