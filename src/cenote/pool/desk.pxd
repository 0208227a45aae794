cimport cython
from cenote.core.machine cimport Machine
from cenote.core.slot cimport Slot
from cenote.pool.link cimport Link

cdef class Desk:
    cdef public Machine machine
    cdef public object take
    cdef public object let
    cdef public dict lent
    cdef public object condition
    cdef public object clock
    cdef public object flush
    cdef public double rest_s
    cdef public bint plain
    cdef public double in_query_s

    @cython.locals(machine=Machine, slot=Slot, best=Slot, link=Link, now=double)
    cpdef lend(self, bint scoped)
    @cython.locals(machine=Machine, slot=Slot, link=Link, now=double, effects=bint)
    cpdef bint take_back(self, object conn) except -1
    @cython.locals(link=Link)
    cpdef _lost(self, Slot slot)
