"""The virtual database `cenote`."""
