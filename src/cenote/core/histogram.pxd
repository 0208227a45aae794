cimport cython

cdef double _FIRST_S
cdef int _LAST

cdef class Histogram:
    cdef public list buckets
    cdef public double sum_s

    @cython.locals(at=int, bound=double)
    cpdef observe(self, double duration_s)
