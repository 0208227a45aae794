cimport cython
from cenote.proxy.prepared cimport Reading, Statement, read
from cenote.proxy.replies cimport Entry, ReplyQueue
from cenote.proxy.roles cimport Borrower, Lender
from cenote.proxy.server cimport ServerConnection
from cenote.sql.plain cimport plain

cdef int _QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE, _EXECUTE, _SYNC, _FLUSH, _FUNCTION, _TERMINATE
cdef int _COPY_DATA, _COPY_DONE, _COPY_FAIL, _STATEMENT, _IDLE, _PREPARED
cdef long _TEXT_BYTES, _HOLD_BYTES, _HELD_BYTES

cdef int _OWED_NAMED_PARSE, _OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND, _OWED_DESCRIBE, _OWED_EXECUTE
cdef int _OWED_CLOSE
cdef int _OWED_OWN_PARSE, _OWED_SYNTHETIC_CLOSE, _OWED_SYNTHETIC

cdef class ClientSession(Borrower):
    cdef public object daemon
    cdef public Lender pool
    cdef public dict statements
    cdef public Reading unnamed_reading
    cdef public object copy_portals
    cdef public int clearing
    cdef public bint skipping
    cdef public bytes held
    cdef public bytes part
    cdef public bint ending
    cdef public long long bytes_in
    cdef public long pid
    cdef public bytes secret
    cdef public object login
    cdef public double connected

    cpdef received(self, bytes data)
    @cython.locals(p="const unsigned char*", n=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t,
                   start=Py_ssize_t, end=Py_ssize_t, length=long, kind=int, first=int, described=bint,
                   repeatable=bint, function=long, server=ServerConnection, statement=Statement, reading=Reading,
                   name=bytes, there=bytes)
    cpdef scan(self, bytes data)
    @cython.locals(server=ServerConnection)
    cdef _flush(self, bytes data, Py_ssize_t start, Py_ssize_t end)
    @cython.locals(replies=ReplyQueue)
    cdef bint _expect(self, ServerConnection server, int kind) except -1
    @cython.locals(old=Statement, statement=Statement, there=bytes)
    cdef bint _parse(self, ServerConnection server, bytes name, bytes tail) except -1
    cdef bint _parse_known(self, bytes data, Py_ssize_t at, Py_ssize_t end) except -1
    @cython.locals(oldest=Statement, statement=Statement)
    cdef bytes _name_there(self, ServerConnection server, bytes name)
    @cython.locals(there=bytes)
    cdef bytes _bring(self, ServerConnection server, bytes name, Statement statement)
    cdef _bring_unnamed(self, ServerConnection server)
    @cython.locals(statement=Statement, there=bytes)
    cdef bint _describe(self, ServerConnection server, bytes data, Py_ssize_t i, Py_ssize_t end) except -1
    @cython.locals(statement=Statement)
    cdef _close_name(self, ServerConnection server, bytes name)
    cdef Statement _undefine_name(self, bytes name)
    cpdef define(self, bytes name, Statement statement)
    cpdef undefine(self, bytes name, Statement statement)
    @cython.locals(touches=int)
    cdef _beware(self, ServerConnection server, Reading reading)
    cdef _hold(self, bytes data)
    cpdef refuse(self, bytes error)
    cdef _decline(self, int kind)
    cpdef go_on_after(self, ServerConnection server)
    cdef _maybe_release(self, ServerConnection server)
    cpdef resubmit(self, bytes batch)
