from cenote.core.machine cimport Machine
from cenote.proxy.roles cimport Lender

cdef class Pinning(Lender):
    cdef public object options
    cdef public Machine machine
    cdef public object works
    cdef public long max_pinned
    cdef public bint refuses_pins
    cdef public dict pins
    cdef public long pinned
    cdef public dict ledger
    cdef public long unlisted
    cdef public object listener
