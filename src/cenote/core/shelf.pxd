cimport cython
from cenote.core.ring cimport Node, Ring
from cenote.core.slot cimport Slot

cdef class Shelf:
    cdef public object cost
    cdef public Ring bare
    cdef public dict rings

    cpdef Py_ssize_t size(self)
    @cython.locals(ring=Ring)
    cpdef Slot best(self, object settings)
    @cython.locals(ring=Ring, slot=Slot, cheapest=Slot)
    cdef Slot _cheapest(self, object settings)
    cpdef Slot oldest(self)
    cpdef list slots(self)
    @cython.locals(ring=Ring, older=Slot)
    cpdef put(self, Slot slot)
    @cython.locals(ring=Ring)
    cpdef remove(self, Slot slot)
