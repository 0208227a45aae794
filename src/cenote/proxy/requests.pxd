cimport cython
from cenote.proxy.prepared cimport Statement
from cenote.proxy.reading cimport Reading, change, may_copy, read
from cenote.proxy.replies cimport Entry, ReplyQueue
from cenote.proxy.server cimport ServerConnection
from cenote.proxy.ties cimport Tied
from cenote.sql.plain cimport plain

cdef int _QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE, _EXECUTE, _SYNC, _FLUSH, _FUNCTION, _COPY_DATA
cdef int _IDLE, _PREPARED, _UNKNOWN
cdef bytes _CHANGES
cdef int _OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND, _OWED_DESCRIBE, _OWED_EXECUTE
cdef int _OWED_CLOSE, _OWED_UNNAMED_PARSE

cdef class Requesting(Tied):
    cdef public object daemon
    cdef public bint skipping
    cdef public bint ending
    cdef public bint repeatable
    cdef public bint described
    cdef public bint copying_query

    @cython.locals(at=Py_ssize_t, last=Py_ssize_t, statement=Statement, reading=Reading)
    cdef bint stops(self, bytes data, int kind, Py_ssize_t i, Py_ssize_t end) except -1
    @cython.locals(statement=Statement, reading=Reading)
    cdef bint reads_parameters(self, bytes data, Py_ssize_t i) except -1
    @cython.locals(reading=Reading)
    cdef Py_ssize_t query(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                          Py_ssize_t end) except -1
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t, reading=Reading)
    cdef Py_ssize_t parse(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                          Py_ssize_t end) except -1
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t, size=Py_ssize_t,
                   statement=Statement, reading=Reading, name=bytes, there=bytes)
    cdef Py_ssize_t bind(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                         Py_ssize_t end) except -1
    @cython.locals(at=Py_ssize_t)
    cdef bint _outdated(self, ServerConnection server, bytes data, Py_ssize_t end) except -1
    cdef Py_ssize_t execute(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                            Py_ssize_t end) except -1
    cdef Py_ssize_t function(self, ServerConnection server, bytes data, Py_ssize_t start, Py_ssize_t i,
                             Py_ssize_t end) except -1
    cdef Py_ssize_t by_name(self, ServerConnection server, bytes data, int kind, Py_ssize_t start, Py_ssize_t i,
                            Py_ssize_t end) except -1
    @cython.locals(replies=ReplyQueue, goes=bint)
    cdef Py_ssize_t pass_on(self, ServerConnection server, bytes data, int kind, Py_ssize_t start, Py_ssize_t i,
                            Py_ssize_t end) except -1
    cdef await_copy(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    cdef _mind_copy(self, ServerConnection server, bytes data, int kind, Py_ssize_t start, Py_ssize_t i,
                    Py_ssize_t end)
    @cython.locals(server=ServerConnection)
    cdef flush(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    cdef malformed(self, int kind)
