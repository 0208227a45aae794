from cenote.proxy.pinning cimport Pinning
from cenote.proxy.roles cimport Borrower
from cenote.proxy.server cimport ServerConnection

cdef class Carrying(Pinning):
    cdef public bint session_mode
    cdef public dict statements
    cdef public dict settings
    cdef public dict ways
    cdef public dict welcome
    cdef public dict base_items
    cdef public object stained
    cdef public bint audits
    cdef public dict audited
    cdef public long long definitions
    cdef public dict customs
    cdef public object code_customs
    cdef public object resets_to
    cdef public long conversions
    cdef public long recovered_plans
    cdef public long long transactions

    cpdef bint convert(self, Borrower client, ServerConnection server, bint guards=*) except -1
    cdef object _way(self, carried, wanted)
    cpdef went_first(self, ServerConnection server, settings, error)
