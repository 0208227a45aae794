cimport cython
from cenote.core.slot cimport Slot

cdef class Link:
    cdef object __weakref__
    cdef public Slot slot
    cdef public object conn
    cdef public object session
    cdef public object handle
    cdef public object key
    cdef public object holder
    cdef public object code
    cdef public long offset
    cdef public bint scoped
    cdef public bint warned
    cdef public bint gone
    cdef public object dropped
    cdef public object ref

    cpdef lend_once(self, object holder)
    cpdef lend(self, object holder, bint scoped)
