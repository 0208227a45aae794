"""The daemon: thousands of clients on a few server connections."""
