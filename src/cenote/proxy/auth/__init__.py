"""Proving who somebody is: clients to us, and us to servers."""
