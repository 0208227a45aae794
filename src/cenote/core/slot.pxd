from cenote.core.ring cimport Node

cdef class Slot(Node):
    cdef public object data
    cdef public object settings
    cdef public str opened
    cdef public str reason
    cdef public long epoch
    cdef public double since
    cdef public double proved
    cdef public double expires
    cdef public double jitter
    cdef public bint timed
    cdef public long uses
    cdef public double rested
    cdef public bint owed

cdef class Waiter(Node):
    cdef public double since
    cdef public double deadline
    cdef public object settings
    cdef public object data
    cdef public Slot slot
    cdef public str refused
    cdef public int passed
