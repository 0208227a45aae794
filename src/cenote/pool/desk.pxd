cimport cython
from cenote.core.machine cimport Machine
from cenote.core.ring cimport Ring
from cenote.core.slot cimport Slot
from cenote.pool.drivers.base cimport Session
from cenote.pool.link cimport Link

cdef class Desk:
    cdef public Machine _machine
    cdef public object _gate
    cdef public object _locked
    cdef public dict _lent
    cdef public object _driver
    cdef public object _condition
    cdef public object _now
    cdef public double _rest_s
    cdef public bint _plain
    cdef public double _in_query_s

    @cython.locals(machine=Machine, ring=Ring, slot=Slot, best=Slot, link=Link, now=double)
    cdef _lend(self, bint scoped, bint once, object wanted)
    @cython.locals(machine=Machine, slot=Slot, link=Link, session=Session, now=double)
    cdef bint _take_back(self, object conn) except -1
    cdef _drop(self, Slot slot)

cdef class Block:
    cdef Desk desk
    cdef object timeout
    cdef object wanted
    cdef object conn
    cdef Link link
    cdef long uses
