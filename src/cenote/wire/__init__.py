"""The PostgreSQL protocol without I/O: bytes in, decisions and bytes out. No sockets, no clock."""
