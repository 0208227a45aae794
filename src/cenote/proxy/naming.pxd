cimport cython
from cenote.proxy.prepared cimport Statement
from cenote.proxy.reading cimport Reading, read
from cenote.proxy.replies cimport Entry, ReplyQueue
from cenote.proxy.roles cimport Borrower, Lender
from cenote.proxy.server cimport ServerConnection

cdef int _OWED_NONE, _OWED_NAMED_PARSE, _OWED_OWN_PARSE, _OWED_SYNTHETIC, _OWED_SYNTHETIC_CLOSE, _OWED_OWN_BRING, _OWED_CLOSE
cdef int _FAILED, _PREPARED

cdef class Named(Borrower):
    cdef public Lender pool
    cdef public dict statements
    cdef public Reading unnamed_reading

    @cython.locals(old=Statement, other=Statement, statement=Statement, there=bytes)
    cdef bint parse_named(self, ServerConnection server, bytes name, bytes tail) except -1
    cdef Statement statement_of(self, bytes tail, reading)
    cdef Statement statement_now(self, ServerConnection server, bytes name, Statement statement)
    @cython.locals(statement=Statement)
    cdef bint parse_known(self, bytes data, Py_ssize_t at, Py_ssize_t end) except -1
    @cython.locals(oldest=Statement, statement=Statement)
    cdef bytes name_there(self, ServerConnection server, bytes name)
    @cython.locals(there=bytes)
    cdef bytes bring(self, ServerConnection server, bytes name, Statement statement)
    @cython.locals(statement=Statement)
    cdef Statement renewed(self, ServerConnection server, bytes name, Statement old)
    cdef bring_unnamed(self, ServerConnection server, int kind=*)
    @cython.locals(statement=Statement, there=bytes)
    cdef bint describe(self, ServerConnection server, bytes name) except -1
    @cython.locals(statement=Statement)
    cdef close_name(self, ServerConnection server, bytes name)
    cdef Statement undefine_name(self, bytes name)
    @cython.locals(statement=Statement, inside=bint)
    cdef take_names(self, ServerConnection server)
    cpdef bytes in_own_names(self, server, bytes body)
    cpdef define(self, bytes name, statement)
    cpdef undefine(self, bytes name, statement)
    cpdef forget_statements(self)
