cimport cython
from cenote.proxy.prepared cimport Reading, Statement, may_copy, read
from cenote.proxy.replies cimport Entry, ReplyQueue
from cenote.proxy.naming cimport Named
from cenote.proxy.server cimport ServerConnection
from cenote.sql.plain cimport plain

cdef int _QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE, _EXECUTE, _SYNC, _FLUSH, _FUNCTION, _TERMINATE
cdef int _COPY_DATA, _COPY_DONE, _COPY_FAIL, _STATEMENT, _IDLE, _PREPARED, _SEQUENCE, _UNKNOWN, _LOAD
cdef int _SETTINGS, _ROLE, _FAILED, _TEMP
cdef list _SHORTEST
cdef long _TEXT_BYTES, _HOLD_BYTES, _HELD_BYTES, _LONGEST

cdef int _OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND, _OWED_DESCRIBE, _OWED_EXECUTE
cdef int _OWED_CLOSE, _OWED_UNNAMED_PARSE

cdef class ClientSession(Named):
    cdef public object daemon
    cdef public object copy_portals
    cdef public int clearing
    cdef public object customs
    cdef public bint builtin
    cdef public bytes text
    cdef public double pinned_at
    cdef public bint skipping
    cdef public bytes held
    cdef public bytes part
    cdef public bint ending
    cdef public bint repeatable
    cdef public bint described
    cdef public bint copies
    cdef public bint copying_query
    cdef public long long bytes_in
    cdef public long pid
    cdef public bytes secret
    cdef public object login
    cdef public double connected

    cpdef received(self, bytes data)
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, i=Py_ssize_t, start=Py_ssize_t, end=Py_ssize_t,
                   length=long, kind=int, first=int, seen=int, server=ServerConnection)
    cpdef scan(self, bytes data)
    cdef _await_copy(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    cdef _mind_copy(self, ServerConnection server, bytes data, int kind, Py_ssize_t start, Py_ssize_t i, Py_ssize_t end)
    cdef _goodbye(self, ServerConnection server)
    @cython.locals(replies=ReplyQueue, at=Py_ssize_t)
    cdef bint _uncertain(self, ServerConnection server, bytes data, int kind, Py_ssize_t i) except -1
    cdef int _seen_enough(self, bytes data, int kind, Py_ssize_t i, long length) except -2
    @cython.locals(server=ServerConnection)
    cdef bint _without_server(self, bytes data, int kind, Py_ssize_t i, Py_ssize_t end) except -1
    @cython.locals(at=Py_ssize_t, last=Py_ssize_t, statement=Statement, reading=Reading)
    cdef bint _stops(self, bytes data, int kind, Py_ssize_t i, Py_ssize_t end) except -1
    cdef bint _next_stops(self) except -1
    @cython.locals(reading=Reading)
    cdef Py_ssize_t _query(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                           Py_ssize_t end) except -1
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t, reading=Reading)
    cdef Py_ssize_t _parse(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                           Py_ssize_t end) except -1
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t, size=Py_ssize_t,
                   statement=Statement, reading=Reading, name=bytes, there=bytes)
    cdef Py_ssize_t _bind(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                          Py_ssize_t end) except -1
    @cython.locals(at=Py_ssize_t)
    cdef bint _outdated(self, ServerConnection server, bytes data, Py_ssize_t end) except -1
    cdef Py_ssize_t _execute(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                             Py_ssize_t end) except -1
    cdef Py_ssize_t _function(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                              Py_ssize_t end) except -1
    cdef Py_ssize_t _by_name(self, ServerConnection server, bytes data, int kind, Py_ssize_t start, Py_ssize_t i,
                             Py_ssize_t end) except -1
    @cython.locals(replies=ReplyQueue, goes=bint)
    cdef Py_ssize_t _pass(self, ServerConnection server, bytes data, int kind, Py_ssize_t start, Py_ssize_t i,
                          Py_ssize_t end) except -1
    @cython.locals(server=ServerConnection)
    cdef _flush(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    @cython.locals(touches=int, at_rest=bint)
    cdef bint _beware(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i,
                      Py_ssize_t end) except -1
    cdef _suspect(self, ServerConnection server, bytes fingerprint)
    cdef _mind_base(self, tuple resets)
    @cython.locals(touches=int)
    cdef _note(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i, Py_ssize_t end)
    cdef bint _may_prepare(self, ServerConnection server, bytes data, Py_ssize_t i) except -1
    cdef bytes _text_bound(self, bytes data, Py_ssize_t i)
    @cython.locals(replies=ReplyQueue)
    cdef _fresh_sequences(self, ServerConnection server, Reading reading)
    @cython.locals(touches=int)
    cdef _beware_bound(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i, Py_ssize_t j,
                       Py_ssize_t end)
    cdef _hold(self, bytes data)
    cpdef refuse(self, bytes error)
    cdef _decline(self, int kind)
    cdef _maybe_release(self, ServerConnection server)
    cpdef resubmit(self, bytes batch)
