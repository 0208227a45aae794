from cenote.core.ring cimport Node

cdef class Agenda:
    cdef public list heap
    cdef public long ticket

    cpdef add(self, double when, Node node)
    cpdef double first(self)
    cpdef Node pop_due(self, double now)
    cpdef sweep(self, Py_ssize_t alive)
