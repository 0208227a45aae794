cimport cython
from cenote.proxy.replies cimport ReplyQueue
from cenote.proxy.requests cimport Requesting
from cenote.proxy.server cimport ServerConnection

cdef int _QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE, _EXECUTE, _SYNC, _FLUSH, _FUNCTION, _TERMINATE
cdef int _COPY_DATA, _COPY_DONE, _COPY_FAIL, _STATEMENT, _IDLE, _FAILED, _OWED_NONE
cdef bytes _SHORTEST, _EMPTY
cdef long _TEXT_BYTES, _HOLD_BYTES, _HELD_BYTES, _LONGEST

cdef class ClientSession(Requesting):
    cdef public bytes part
    cdef public long long bytes_in
    cdef public long pid
    cdef public bytes secret
    cdef public object login
    cdef public double connected

    cpdef received(self, bytes data)
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, i=Py_ssize_t, start=Py_ssize_t, end=Py_ssize_t,
                   length=long, kind=int, least=int, first=Py_ssize_t, seen=int, server=ServerConnection)
    cpdef scan(self, bytes data)
    cdef scan_again(self, bytes data)
    cdef _goodbye(self, ServerConnection server)
    @cython.locals(replies=ReplyQueue, at=Py_ssize_t)
    cdef bint _uncertain(self, ServerConnection server, bytes data, int kind, Py_ssize_t i) except -1
    cdef int _seen_enough(self, bytes data, int kind, Py_ssize_t i, long length) except -2
    @cython.locals(server=ServerConnection)
    cdef bint _without_server(self, bytes data, int kind, Py_ssize_t i, Py_ssize_t end) except -1
    cdef bint _fits(self, ServerConnection server) except -1
    cdef bint _next_stops(self) except -1
    cpdef refuse(self, bytes error)
    cdef _decline(self, int kind)
    cdef _maybe_release(self, ServerConnection server)
    cpdef resubmit(self, bytes batch)
