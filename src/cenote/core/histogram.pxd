cdef class Histogram:
    cdef public list buckets
    cdef public double sum_s

    cpdef observe(self, double duration_s)
