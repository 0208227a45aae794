cimport cython
from cenote.proxy.naming cimport Named
from cenote.proxy.prepared cimport Statement
from cenote.proxy.reading cimport Reading
from cenote.proxy.server cimport ServerConnection

cdef int _BIND, _EXECUTE, _DESCRIBE, _SYNC, _FLUSH
cdef int _OWED_NONE, _PREPARED, _SEQUENCE, _UNKNOWN, _LOAD, _SETTINGS, _TEMP, _IDLE, _FAILED

cdef class Tied(Named):
    cdef public bytes held
    cdef public object customs
    cdef public bint builtin
    cdef public bytes text
    cdef public int clearing
    cdef public bint executed
    cdef public double pinned_at
    cdef public bint copies
    cdef public object copy_portals

    @cython.locals(touches=int, at_rest=bint)
    cdef bint beware(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i,
                     Py_ssize_t end) except -1
    @cython.locals(touches=int)
    cdef beware_bound(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i, Py_ssize_t j,
                      Py_ssize_t end)
    cdef suspect(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i, Py_ssize_t end)
    @cython.locals(touches=int)
    cdef _note(self, ServerConnection server, Reading reading, bytes data, Py_ssize_t i, Py_ssize_t end)
    cdef mind_nulls(self, Reading reading, bytes data, Py_ssize_t i, Py_ssize_t end)
    cdef _mind_base(self, tuple resets)
    @cython.locals(at=Py_ssize_t, name=bytes)
    cdef tuple bound_to(self, bytes data, Py_ssize_t i)
    @cython.locals(statement=Statement)
    cdef bytes _text_bound(self, bytes data, Py_ssize_t i)
    cdef fresh_sequences(self, ServerConnection server, Reading reading)
    cdef bint may_prepare(self, ServerConnection server, bytes data, Py_ssize_t i) except -1
    cdef bint clears_alone(self, ServerConnection server, bytes data, int kind, Py_ssize_t i) except -1
    cdef cleared_within(self, ServerConnection server)
    cdef hold(self, bytes data)
